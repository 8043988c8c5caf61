"""A directory as the reference publishes it: arguments and weights in files, our language model or entropy model out.

    DIR/params.json       arguments of the run: `model` or `entropy_model`, and `data.patcher_args`; or
    DIR/config.json       `args` alone
    DIR/model.safetensors, its index and parts, consolidated.safetensors, consolidated.pth or consolidated.00.pth
    DIR/entropy_model/    the entropy model, laid out alike; it may also be among the weights, under a prefix

Nothing is unpickled but tensors. Every tensor is placed, or a CheckpointError names the file and the tensors.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from blt.checkpoint import LanguageModel, fingerprint
from blt.config_json import json_object
from blt.entropy_model import EntropyModel
from blt.errors import CheckpointError, ConfigError
from blt.interop.arguments import Arguments
from blt.interop.reference import from_reference, reference_shape
from blt.interop.weights import read_tensors
from blt.model import BLT
from blt.patching import Kind, PatchRule

WEIGHTS_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "consolidated.safetensors",
    "consolidated.pth",
    "consolidated.00.pth",
)
"""Where weights may be, the first of them that is there."""

_WRAPPERS = re.compile(r"_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.")
"""What torch puts into the names of compiled, sharded and recomputed modules."""

_KINDS: dict[str, Kind] = {"entropy": "entropy", "space": "space", "static": "fixed", "byte": "byte"}

_EMBEDDING = "tok_embeddings.weight"
"""A tensor that every model of the reference has, and so tells under which prefix its tensors stand."""


_HINT = " (`ignore` passes over names that are known to change no number)"


@dataclass(frozen=True, kw_only=True)
class _Source:
    """What a directory holds, without the names to be passed over."""

    arguments_path: Path
    document: Mapping[str, object]
    weights_path: Path
    tensors: Mapping[str, Tensor]

    def blt_arguments(self) -> Mapping[str, object] | None:
        """A BLT's arguments, None if it is no BLT's directory."""
        return _section(self.document, ("model", "args"), "dim_global")

    def entropy_arguments(self) -> Mapping[str, object] | None:
        """An entropy model's arguments, None if there are none."""
        return _section(self.document, ("entropy_model", "args"), "n_layers")


def from_reference_directory(
    directory: str | Path,
    *,
    entropy_model: str | Path | None = None,
    patch_rule: PatchRule | None = None,
    dtype: torch.dtype | None = None,
    ignore: Collection[str] = (),
) -> LanguageModel | EntropyModel:
    """The language model of a BLT's directory, or the entropy model of an entropy model's, on the CPU.

    `entropy_model`: directory of the BLT's entropy model; None looks for DIR/entropy_model and then among the weights.
    `patch_rule`: None takes what the arguments say (`data.patcher_args`, else the model's own). `dtype`: None keeps the
    weights'. `ignore`: exact names of arguments and tensors to pass over. ConfigError for a BLT whose rule needs an
    entropy model that is not found; CheckpointError, naming the file, for what is missing, broken or does not fit.
    """
    source = _read(Path(directory), ignore)
    arguments = source.blt_arguments()
    if arguments is None:
        return _entropy_model(source, source.tensors, dtype)
    own, inside = _parted(source.tensors)
    where = _entropy_directory(Path(directory), entropy_model)
    patcher = None
    if where is not None:
        apart = _read(where, ignore)
        patcher = _entropy_model(apart, apart.tensors, dtype)
        own |= inside  # a second entropy model is not passed over
    elif inside:
        patcher = _entropy_model(source, inside, dtype)
    with _faults_of(source.arguments_path):
        rule = patch_rule or _patch_rule(source.document, arguments)
    if patcher is None and rule.needs_entropies:
        raise ConfigError(
            f"entropy_model must name the directory of the entropy model: a patch rule of kind {rule.kind} needs one, "
            f"and neither {Path(directory) / 'entropy_model'} nor {source.weights_path.name} holds it"
        )
    model = _fitted(source, own, arguments, dtype)
    assert isinstance(model, BLT)
    return LanguageModel(
        model=model,
        entropy_model=patcher,
        patch_rule=rule,
        reset_on_newline=False,
        config=model.config,
        provenance={},
        entropy_fingerprint=None if patcher is None else fingerprint(patcher),
    )


def _read(root: Path, ignore: Collection[str]) -> _Source:
    """The arguments and tensors of a directory, those of `ignore` left out."""
    path = next(
        (root / name for name in ("params.json", "config.json") if (root / name).exists()), root / "params.json"
    )
    with _faults_of(path):
        document = _without(json_object(json.loads(path.read_text(encoding="utf-8")), "of the file itself"), ignore)
    weights = next((root / name for name in WEIGHTS_NAMES if (root / name).exists()), None)
    if weights is None:
        raise CheckpointError(f"{root}: holds no weights; looked for {', '.join(WEIGHTS_NAMES)}")
    if (root / "consolidated.01.pth").exists() and weights.name == "consolidated.00.pth":
        raise CheckpointError(f"{weights}: is one of several parts; they must be merged into one file first")
    with _faults_of(weights):
        tensors = _unwrapped(read_tensors(weights))
    return _Source(
        arguments_path=path,
        document=document,
        weights_path=weights,
        tensors={name: tensor for name, tensor in tensors.items() if name not in ignore},
    )


def _without(document: Mapping[str, object], ignore: Collection[str]) -> dict[str, object]:
    """The document and its sections without the keys of `ignore`."""
    return {
        key: _without(value, ignore) if isinstance(value, dict) else value
        for key, value in document.items()
        if key not in ignore
    }


def _section(document: Mapping[str, object], names: tuple[str, ...], telling: str) -> Mapping[str, object] | None:
    """The first section of these names, or else the document itself, that has the key `telling`."""
    for candidate in (*(document.get(name) for name in names), document):
        if isinstance(candidate, dict) and candidate.get(telling) is not None:
            return candidate
    return None


def _entropy_directory(root: Path, given: str | Path | None) -> Path | None:
    if given is not None:
        return Path(given)
    return root / "entropy_model" if (root / "entropy_model").is_dir() else None


def _entropy_model(source: _Source, tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> EntropyModel:
    arguments = source.entropy_arguments()
    if arguments is None or source.blt_arguments() is arguments:
        raise CheckpointError(
            f"{source.arguments_path}: holds no arguments of an entropy model (n_layers, dim, n_heads)"
        )
    model = _fitted(source, _without_prefix(tensors), arguments, dtype)
    assert isinstance(model, EntropyModel)
    return model


def _fitted(
    source: _Source, tensors: Mapping[str, Tensor], arguments: Mapping[str, object], dtype: torch.dtype | None
) -> BLT | EntropyModel:
    """The model of these arguments and tensors; what is wrong with either names its file."""
    with _faults_of(source.arguments_path, _HINT):
        reference_shape(arguments)
    with _faults_of(source.weights_path, _HINT):
        return from_reference(tensors, arguments, dtype=dtype)


def _unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without what torch's wrappers put into them. ValueError if two become one."""
    named = {_WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    if len(named) != len(tensors):
        raise ValueError("tensors stand there twice, with and without the name of a wrapper of torch")
    return named


def _parted(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A BLT's tensors without their common prefix, and those of an entropy model under a prefix of its own."""
    whole, local = dict(tensors), f"local_encoder.{_EMBEDDING}"
    inner = [name.removesuffix(_EMBEDDING) for name in whole if name.endswith(f".{_EMBEDDING}") and local not in name]
    inside = {name: tensor for name, tensor in whole.items() if inner and name.startswith(inner[0])}
    own = {name: tensor for name, tensor in whole.items() if name not in inside}
    outer = next((name.removesuffix(local) for name in own if name.endswith(local)), "")
    return {name.removeprefix(outer): tensor for name, tensor in own.items()}, inside


def _without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An entropy model's tensors without their common prefix."""
    prefix = next((name.removesuffix(_EMBEDDING) for name in tensors if name.endswith(_EMBEDDING)), "")
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _patch_rule(document: Mapping[str, object], model: Mapping[str, object]) -> PatchRule:
    """The rule of the run's data, or of the model where there is none; a threshold of None is the default."""
    data = document.get("data")
    patcher = data.get("patcher_args") if isinstance(data, dict) else None
    prefix, values = ("", patcher) if isinstance(patcher, dict) else ("patching_", model)
    read = Arguments(values, (), {})
    mode = read.one_of("patching_mode", tuple(_KINDS), "entropy")
    return PatchRule(
        kind=_KINDS[mode],
        threshold=read.number(f"{prefix}threshold", PatchRule.threshold),
        threshold_add=read.optional_number(f"{prefix}threshold_add"),
        monotonic=read.flag("monotonicity", False),
        patch_size=read.optional_number("patch_size") if mode == "static" else None,
        max_patch_length=read.optional_integer("max_patch_length"),
    )


@contextmanager
def _faults_of(path: Path, hint: str = "") -> Iterator[None]:
    """Faults in reading or fitting a file become a CheckpointError of one line: its name, what is wrong, the hint."""
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{error.filename or path}: no such file; a directory of the reference has one"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {' '.join(str(error).split())}{hint}") from error
