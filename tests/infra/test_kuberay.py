"""Manifests for KubeRay: valid against its definitions, and what each of them promises.

Overlays are what kustomize makes of them; the files of the base are checked without it too. Rules that the definitions
hold in CEL, and what Kubernetes itself thinks of a pod beyond its shape, are not covered.
"""

import copy
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from blt.model import BLT
from jobs import train
from jobs.command_line import COMMANDS
from jobs.configuration import find_config, load_config
from pipelines.train import replicated
from tests.infra.kubernetes import Manifest, check_resource, crd_schema, faults, of_kind, rendered
from tests.infra.test_docker import LOCKED, TAG
from tests.infra.tools import INFRA

KUBERAY = INFRA / "kuberay"
TARGETS = ("kind", "aws", "gcp")
JOBS = ("patch", "train")
OVERLAYS = [f"{target}/{what}" for target in TARGETS for what in ("cluster", *JOBS)]
FILES = [KUBERAY / "base" / "cluster.yaml", *(KUBERAY / "jobs" / job / "job.yaml" for job in JOBS)]
OWN = {"app.kubernetes.io/part-of": "blt-ray"}
STORAGE_BYTES_PER_SECOND = 100e6
"""Of one worker that writes a checkpoint to S3: a low one."""


def overlay(name: str) -> tuple[Manifest, ...]:
    return rendered(KUBERAY / "overlays" / name)


def cluster_spec(manifests: tuple[Manifest, ...]) -> Manifest:
    """The specification of the one cluster that an overlay makes, by itself or in its job."""
    (ray,) = [manifest for manifest in manifests if manifest["apiVersion"].startswith("ray.io/")]
    spec: Manifest = ray["spec"]
    return spec if ray["kind"] == "RayCluster" else spec["rayClusterSpec"]


def pod_templates(spec: Manifest) -> dict[str, Manifest]:
    """Of the head and of every group of workers."""
    return {"head": spec["headGroupSpec"]["template"]} | {
        group["groupName"]: group["template"] for group in spec["workerGroupSpecs"]
    }


def containers(value: Any) -> Iterator[Manifest]:
    """All containers anywhere in a manifest."""
    if isinstance(value, dict):
        yield from value.get("containers", [])
        for each in value.values():
            yield from containers(each)
    elif isinstance(value, list):
        for each in value:
            yield from containers(each)


def gpus(container: Manifest) -> int:
    return int(container["resources"]["limits"].get("nvidia.com/gpu", 0))


def memory_gib(quantity: str) -> float:
    number, unit = re.fullmatch(r"([\d.]+)([GM]i)", quantity).groups()  # type: ignore[union-attr]
    return float(number) / (1024 if unit == "Mi" else 1)


def cores(quantity: str) -> float:
    return float(quantity[:-1]) / 1000 if quantity.endswith("m") else float(quantity)


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_files_of_the_base_are_valid(file: Path) -> None:
    assert check_resource(yaml.safe_load(file.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("name", OVERLAYS)
def test_overlays_are_valid(name: str) -> None:
    manifests = overlay(name)
    kinds = sorted(manifest["kind"] for manifest in manifests)
    expected = ["NetworkPolicy", "RayCluster" if name.endswith("cluster") else "RayJob", "ServiceAccount"]
    expected += [] if name.startswith("aws") else ["PersistentVolumeClaim"]
    expected += ["ConfigMap"] if name == "kind/train" else []
    assert kinds == sorted(expected)
    for manifest in manifests:
        if manifest["apiVersion"].startswith("ray.io/"):
            assert check_resource(manifest) == []
    group = crd_schema("RayCluster")["properties"]["spec"]["properties"]
    rules = group["networkPolicy"]["properties"]["head"]["properties"]  # the same types as Kubernetes' own policies
    (policy,) = of_kind(manifests, "NetworkPolicy")
    assert faults(policy["spec"]["ingress"], rules["ingressRules"]) == []
    assert faults(policy["spec"]["egress"], rules["egressRules"]) == []
    pod = group["headGroupSpec"]["properties"]["template"]["properties"]["spec"]["properties"]
    claim = pod["volumes"]["items"]["properties"]["ephemeral"]["properties"]["volumeClaimTemplate"]["properties"]
    for manifest in of_kind(manifests, "PersistentVolumeClaim"):
        assert faults(manifest["spec"], claim["spec"]) == []


def wrong_field(spec: Manifest) -> None:
    spec["headGroupSpec"]["template"]["spec"]["containers"][0]["resourcess"] = {}


def wrong_value(spec: Manifest) -> None:
    spec["autoscalerOptions"]["version"] = "v3"


def wrong_type(spec: Manifest) -> None:
    spec["workerGroupSpecs"][0]["maxReplicas"] = "16"


def missing(spec: Manifest) -> None:
    del spec["workerGroupSpecs"][0]["template"]


def missing_default(spec: Manifest) -> None:
    """Demanded, but the definition has a default for it: no fault."""
    del spec["workerGroupSpecs"][0]["maxReplicas"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (wrong_field, "'resourcess' was unexpected"),
        (wrong_value, "'v3' is not one of"),
        (wrong_type, "'16' is not of type 'integer'"),
        (missing, "'template' is a required property"),
        (missing_default, None),
    ],
)
def test_what_the_api_server_would_refuse_is_found(change: Any, expected: str | None) -> None:
    manifest = copy.deepcopy(yaml.safe_load(FILES[0].read_text(encoding="utf-8")))
    change(manifest["spec"])
    found = check_resource(manifest)
    assert [expected in fault for fault in found] == ([True] if expected else []), found


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_head_does_no_work_and_groups_scale(name: str) -> None:
    spec = cluster_spec(overlay(name))
    start = spec["headGroupSpec"]["rayStartParams"]
    assert (start["num-cpus"], start["num-gpus"]) == ("0", "0")
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["version"] == "v2"
    for group in spec["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        if gpus(group["template"]["spec"]["containers"][0]):
            assert group["minReplicas"] == 0, "a GPU that waits for work is paid for"
    assert [group["groupName"] for group in spec["workerGroupSpecs"]] == (
        ["cpu"] if name.startswith("kind") else ["cpu", "gpu-spot", "gpu8-spot"]
    )


@pytest.mark.parametrize("name", OVERLAYS)
def test_tokens_and_no_keys(name: str) -> None:
    manifests = overlay(name)
    assert cluster_spec(manifests)["authOptions"] == {"mode": "token", "secretName": "blt-ray-token"}
    (account,) = of_kind(manifests, "ServiceAccount")
    for template in pod_templates(cluster_spec(manifests)).values():
        assert template["spec"]["serviceAccountName"] == account["metadata"]["name"]
    assert not of_kind(manifests, "Secret")
    text = yaml.safe_dump_all(manifests)
    assert not re.search(r"AKIA|SECRET_ACCESS|AWS_ACCESS|(?<!allow)PRIVATE KEY|password", text, re.IGNORECASE)
    assert set(re.findall(r"\b[A-Z]{4,}\b", text)) <= {"REGISTRY", "BUCKET"}, "what the reader has to fill in"


@pytest.mark.parametrize("name", OVERLAYS)
def test_containers_are_bounded_and_have_no_rights(name: str) -> None:
    manifests = overlay(name)
    found = list(containers(list(manifests)))
    assert len(found) == len(pod_templates(cluster_spec(manifests))) + (0 if name.endswith("cluster") else 1)
    for container in found:
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        assert cores(requests["cpu"]) <= cores(limits["cpu"])
        assert requests.get("nvidia.com/gpu") == limits.get("nvidia.com/gpu")
        if container["name"] != "submitter":
            assert memory_gib(requests["memory"]) == memory_gib(limits["memory"])
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    (ray,) = [manifest for manifest in manifests if manifest["apiVersion"].startswith("ray.io/")]
    templates = list(pod_templates(cluster_spec(manifests)).values())
    for template in [*templates, *([ray["spec"]["submitterPodTemplate"]] if ray["kind"] == "RayJob" else [])]:
        assert template["spec"]["securityContext"]["runAsNonRoot"] is True
        assert template["spec"]["securityContext"]["runAsUser"] == 10001, "the user of the image"


@pytest.mark.parametrize("name", OVERLAYS)
def test_one_version_everywhere(name: str) -> None:
    manifests = overlay(name)
    assert cluster_spec(manifests)["rayVersion"] == LOCKED["ray"]
    registry = "" if name.startswith("kind") else "REGISTRY/"
    assert {container["image"] for container in containers(list(manifests))} == {f"{registry}blt-ray:{TAG}"}


@pytest.mark.parametrize("target", ["aws", "gcp"])
def test_gpu_nodes_are_spot_and_others_are_not(target: str) -> None:
    spot = {
        "aws": {"karpenter.sh/capacity-type": "spot"},
        "gcp": {"cloud.google.com/gke-spot": "true"},
    }[target]
    for name, template in pod_templates(cluster_spec(overlay(f"{target}/cluster"))).items():
        on_gpu = gpus(template["spec"]["containers"][0]) > 0
        assert (spot.items() <= template["spec"]["nodeSelector"].items()) == on_gpu, name
        tolerated = {item["key"] for item in template["spec"].get("tolerations", [])}
        assert tolerated == ({"nvidia.com/gpu", "blt-ray/spot"} if on_gpu else set()), name
        assert on_gpu == name.endswith("-spot")


def test_node_pools_of_eks_are_those_that_pods_ask_for() -> None:
    pools = {}
    for pool in yaml.safe_load_all((INFRA / "aws" / "eks-node-pools.yaml").read_text(encoding="utf-8")):
        node = pool["spec"]["template"]
        allowed = {item["key"]: item["values"] for item in node["spec"]["requirements"]}
        labels = node["metadata"]["labels"] | {"karpenter.sh/capacity-type": allowed["karpenter.sh/capacity-type"][0]}
        pools[node["metadata"]["labels"]["blt-ray/pool"]] = (labels, {taint["key"] for taint in node["spec"]["taints"]})
        assert len(allowed["node.kubernetes.io/instance-type"]) > 1, "spot capacity is found by asking for several"
    spec = cluster_spec(overlay("aws/cluster"))
    for group in spec["workerGroupSpecs"][1:]:
        pod = group["template"]["spec"]
        labels, taints = pools[pod["nodeSelector"]["blt-ray/pool"]]
        assert pod["nodeSelector"].items() <= labels.items()
        assert taints == {item["key"] for item in pod["tolerations"]}


def test_the_grace_is_longer_than_a_checkpoint() -> None:
    """Of the largest packaged model, from the eight workers of one node: weights and two moments in float32."""
    with torch.device("meta"):
        model = BLT(load_config(train.Config, find_config("blt_8b"), ["data=d", "output=o"]).model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    seconds = 12 * parameters / 8 / STORAGE_BYTES_PER_SECOND
    spec = cluster_spec(rendered(KUBERAY / "base"))
    for group in spec["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        command = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert seconds < float(command[-1]) < pod["terminationGracePeriodSeconds"]
        script = Path(command[1]).relative_to("/opt/blt-ray")
        assert (INFRA.parent / script).exists()


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_network_is_the_clusters_own(name: str) -> None:
    """Ports: all those that Ray fixes, and any that the system gives (gloo, NCCL, Ray Train, torchft)."""
    manifests = overlay(name)
    (policy,) = of_kind(manifests, "NetworkPolicy")
    assert policy["spec"]["podSelector"] == {"matchLabels": OWN}
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    for template in pod_templates(cluster_spec(manifests)).values():
        assert OWN.items() <= template["metadata"]["labels"].items()
    among = [{"podSelector": {"matchLabels": OWN}}]
    for rules, peers in ((policy["spec"]["ingress"], "from"), (policy["spec"]["egress"], "to")):
        (ports,) = [rule["ports"] for rule in rules if rule.get(peers) == among]
        assert ports == [{"protocol": "TCP", "port": 1024, "endPort": 65535}]
    named = {port["containerPort"] for container in containers(list(manifests)) for port in container.get("ports", [])}
    assert {6379, 8265, 10001, 8080} <= named
    for rule in policy["spec"]["ingress"]:
        assert rule["from"], "nobody else"
        if rule["from"] != among:
            assert all("endPort" not in port for port in rule["ports"])
    assert policy["spec"]["egress"][-1].get("to", []) or not name.startswith("aws")


def test_replicated_training_takes_ports_that_the_system_gives() -> None:
    """What the policy's range is wide for. A Lighthouse on a port of its own could have a rule of its own."""
    config = replicated.replicated_backend("10.0.0.1", 1)
    assert config.lighthouse_kwargs["bind"] == "10.0.0.1:0"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("job", JOBS)
def test_jobs_end_start_again_and_leave_nothing(target: str, job: str) -> None:
    (ray_job,) = of_kind(overlay(f"{target}/{job}"), "RayJob")
    spec = ray_job["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["backoffLimit"] >= 1
    assert spec["activeDeadlineSeconds"] > 0
    assert spec["submissionMode"] == "K8sJobMode"
    assert spec["submitterPodTemplate"]["metadata"]["labels"] == OWN, "the policy lets it through"
    (cluster,) = of_kind(overlay(f"{target}/cluster"), "RayCluster")
    alike = copy.deepcopy(spec["rayClusterSpec"])
    if (target, job) == ("kind", "train"):  # mounts its settings besides
        head = alike["headGroupSpec"]["template"]["spec"]
        head["volumes"].pop()
        head["containers"][0]["volumeMounts"].pop()
    assert alike == cluster["spec"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("job", JOBS)
def test_commands_of_jobs_are_valid(target: str, job: str, tmp_path: Path) -> None:
    manifests = overlay(f"{target}/{job}")
    (ray_job,) = of_kind(manifests, "RayJob")
    program, command, *arguments = shlex.split(ray_job["spec"]["entrypoint"])
    assert (program, command) == ("blt", job)
    assert arguments[:2] == ["--log-format", "json"], "what collects the logs of pods can tell runs apart"
    del arguments[:2]
    config: Path | None = None
    if "--config" in arguments:
        at = arguments.index("--config")
        name = arguments[at + 1]
        del arguments[at : at + 2]
        if name.startswith("/etc/blt-ray/"):
            (settings,) = of_kind(manifests, "ConfigMap")
            config = tmp_path / "settings.yaml"
            config.write_text(settings["data"][Path(name).name])
        else:
            config = find_config(name)
    found: Any = load_config(importlib.import_module(COMMANDS[command].module).Config, config, arguments)
    assert found.wait_for_resources is True, "nodes come when they are asked for"
    spec = cluster_spec(manifests)
    largest = [group["template"]["spec"]["containers"][0] for group in spec["workerGroupSpecs"]]
    each = (
        (found.cpus_per_actor, found.gpus_per_actor)
        if job == "patch"
        else (found.cpus_per_worker, found.gpus_per_worker)
    )
    room = [
        group["maxReplicas"]
        * int(min(cores(c["resources"]["limits"]["cpu"]) / each[0], gpus(c) / each[1] if each[1] else float("inf")))
        for group, c in zip(spec["workerGroupSpecs"], largest, strict=True)
    ]
    assert max(room) >= (found.max_actors if job == "patch" else found.workers), "some group can hold it"


def test_kueue_is_an_option(tmp_path: Path) -> None:
    """The component that the overlays name in a comment, put to use."""
    text = (KUBERAY / "overlays" / "aws" / "train" / "kustomization.yaml").read_text(encoding="utf-8")
    assert "\n  # - ../../../components/kueue\n" in text
    copied = tmp_path / "kuberay"
    for file in KUBERAY.rglob("*.yaml"):
        target = copied / file.relative_to(KUBERAY)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(
            file.read_text(encoding="utf-8").replace("  # - ../../../components/kueue", "  - ../../../components/kueue")
        )
    (plain,) = of_kind(overlay("aws/train"), "RayJob")
    (queued,) = of_kind(rendered(copied / "overlays" / "aws" / "train"), "RayJob")
    assert check_resource(queued) == []
    assert queued["metadata"]["labels"] == {**OWN, "kueue.x-k8s.io/queue-name": "blt-ray"}
    assert queued["metadata"]["annotations"] == {"kueue.x-k8s.io/elastic-job": "true"}
    assert queued["spec"] == plain["spec"]
