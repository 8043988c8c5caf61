"""Kubernetes' view of manifests: structural schemas of custom resources, their defaults, and what kustomize prints."""

import copy
import os
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.infra.tools import kustomize

Manifest = dict[str, Any]
Schema = dict[str, Any]

_TYPED = ("type", "enum", "format", "pattern", "minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems")


def crd_schema(kind: str, version: str = "v1") -> Schema:
    """The schema of a kind of KubeRay, as JSON Schema; skips where KUBERAY_CRDS does not name the definitions."""
    directory = os.environ.get("KUBERAY_CRDS")
    if not directory:
        pytest.skip("KUBERAY_CRDS does not name a directory with KubeRay's custom resource definitions")
    return _crd_schema(Path(directory), kind, version)


@lru_cache
def _crd_schema(directory: Path, kind: str, version: str) -> Schema:
    text = (directory / f"ray.io_{kind.lower()}s.yaml").read_text(encoding="utf-8")
    definition = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (found,) = [one for one in definition["spec"]["versions"] if one["name"] == version]
    return strict(found["schema"]["openAPIV3Schema"])


def strict(structural: Schema) -> Schema:
    """A structural schema of Kubernetes as JSON Schema. The API server drops a field that the schema does not name, and
    `kubectl apply` refuses it: here it is an error. Rules in CEL are left out.
    """
    schema: Schema = {key: structural[key] for key in _TYPED if key in structural}
    if structural.get("x-kubernetes-int-or-string"):
        schema["type"] = ["integer", "string"]
    if structural.get("nullable") and "type" in schema:
        schema["type"] = [schema["type"], "null"]
    for key in ("anyOf", "allOf", "oneOf"):
        if key in structural:
            schema[key] = structural[key]
    if "default" in structural:
        schema["default"] = structural["default"]
    if "items" in structural:
        schema["items"] = strict(structural["items"])
    if "properties" in structural:
        schema["properties"] = {name: strict(each) for name, each in structural["properties"].items()}
    if "required" in structural:
        schema["required"] = structural["required"]
    if structural.get("x-kubernetes-embedded-resource"):
        schema["properties"] = {"apiVersion": {}, "kind": {}, "metadata": {}} | schema.get("properties", {})
    additional = structural.get("additionalProperties")
    if structural.get("type") == "object":
        if structural.get("x-kubernetes-preserve-unknown-fields") or additional is True:
            pass
        elif isinstance(additional, dict):
            schema["additionalProperties"] = strict(additional)
        else:
            schema["additionalProperties"] = False
    return schema


def with_defaults(value: Any, schema: Schema) -> Any:
    """A copy of a manifest with the schema's defaults, as the API server fills them in before it checks."""
    if isinstance(value, dict):
        named, others = schema.get("properties", {}), schema.get("additionalProperties")
        filled = {
            key: with_defaults(each, named.get(key, others if isinstance(others, dict) else {}))
            for key, each in value.items()
        }
        missing = {
            key: copy.deepcopy(each["default"])
            for key, each in named.items()
            if "default" in each and key not in filled
        }
        return filled | missing
    if isinstance(value, list):
        return [with_defaults(each, schema.get("items", {})) for each in value]
    return value


def faults(manifest: Any, schema: Schema) -> list[str]:
    """What the API server would refuse in a manifest, with the place of each."""
    validator = jsonschema.Draft202012Validator(schema)
    found = validator.iter_errors(with_defaults(manifest, schema))
    return sorted(f"{'/'.join(map(str, error.absolute_path))}: {error.message[:300]}" for error in found)


def check_resource(manifest: Manifest) -> list[str]:
    """Faults of a resource of KubeRay; its metadata, which the definitions leave open, must have a name."""
    schema = crd_schema(manifest["kind"])
    schema = schema | {"properties": schema["properties"] | {"metadata": {"type": "object", "required": ["name"]}}}
    return faults(manifest, schema)


@lru_cache
def rendered(directory: Path) -> tuple[Manifest, ...]:
    """The resources that kustomize makes of a directory; skips where the program is missing."""
    command = kustomize()
    if command is None:
        pytest.skip("neither kustomize nor kubectl is installed")
    found = subprocess.run([*command, str(directory)], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    return tuple(yaml.safe_load_all(found.stdout))


def of_kind(manifests: tuple[Manifest, ...], kind: str) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["kind"] == kind]
