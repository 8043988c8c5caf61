"""Checkpoints on disk: a trained model, its entropy model and its patch rule, in one directory that loads strictly.

    DIR/config.json                  format, kind, model, patch_rule, reset_on_newline, entropy_model, provenance
    DIR/model.safetensors            weights under our parameter names
    DIR/entropy_model/config.json    format, kind, model, fingerprint, provenance
    DIR/entropy_model/model.safetensors

In and out: `LanguageModel`, or an `EntropyModel` alone (its directory is laid out like DIR/entropy_model). Every file
is written under a temporary name and then moved into place, config.json last. Only JSON and safetensors are read, so
loading never runs code from a file. Whatever is missing, broken or does not fit is a CheckpointError of one line.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar, cast, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from blt.config_json import Json, canonical_text, from_json, json_object, to_json
from blt.entropy_model import EntropyModel, EntropyModelConfig
from blt.errors import CheckpointError
from blt.model import BLT, BLTConfig
from blt.patching import PatchRule
from blt.placement import AnyModel, Config, place

FORMAT = 1
"""Version of the directory's layout and keys; a reader refuses any other."""

Kind = Literal["blt", "entropy_model"]
Content = TypeVar("Content")


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """A BLT with what it takes to patch text for it: the entropy model and rule it was trained with."""

    model: BLT
    entropy_model: EntropyModel | None
    """None where the rule needs no entropies, or where only precomputed patches will be used."""
    patch_rule: PatchRule
    reset_on_newline: bool
    """Whether a newline opens a new context of the entropy model."""
    config: BLTConfig
    provenance: dict[str, str]
    """Where the model comes from: data manifest, bytes, bpb and the like."""
    entropy_fingerprint: str | None = None
    """Fingerprint of the entropy model that the patches were made with, in the dtype it was stored in; None: that of
    `entropy_model`. Known even where `entropy_model` is None or was cast while loading."""


def fingerprint(model: BLT | EntropyModel) -> str:
    """sha256 (hex) of a model's configuration and of every tensor's name, dtype, shape and bytes, in name order.

    Independent of the device, not of the dtype: a model cast to bfloat16 is another model, with other entropies.
    """
    tensors = sorted(model.state_dict().items())
    return weights_fingerprint(model.config, ((name, tensor.detach().cpu()) for name, tensor in tensors))


def save_entropy_model(model: EntropyModel, directory: str | Path, provenance: Mapping[str, str] | None = None) -> None:
    """Write an entropy model that `load_entropy_model` reads; an existing one in `directory` is replaced."""
    _write_model(
        model,
        Path(directory),
        "entropy_model",
        {"fingerprint": fingerprint(model), "provenance": dict(provenance or {})},
    )


def load_entropy_model(
    directory: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> EntropyModel:
    """The entropy model of a directory, its weights checked against their stored fingerprint; CheckpointError."""
    model, _ = _load_entropy_model(Path(directory), torch.device(device), dtype)
    return model


def model_kind(directory: str | Path) -> Kind:
    """What config.json says that the directory holds; CheckpointError if that is neither kind of model."""
    path = Path(directory) / "config.json"
    try:
        kind = json_object(json.loads(path.read_text(encoding="utf-8")), "of the file itself").get("kind")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; a checkpoint has one") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {_line(error)}") from error
    for known in get_args(Kind):
        if kind == known:
            return cast(Kind, known)
    raise CheckpointError(f"{path}: key kind must be one of {', '.join(get_args(Kind))}, got {kind!r}")


def entropy_model_fingerprint(directory: str | Path) -> str:
    """The fingerprint that an entropy model's config.json states (`load_entropy_model` verifies it); CheckpointError.

    It is that of the weights as stored, whatever dtype they are loaded in.
    """
    return _parse(Path(directory) / "config.json", lambda values: _text(values, "fingerprint"), "entropy_model")


def entropy_model_config(directory: str | Path) -> EntropyModelConfig:
    """The shape that an entropy model's config.json states; CheckpointError."""
    return _parse(Path(directory) / "config.json", _entropy_model_config, "entropy_model")[0]


def language_model_config(directory: str | Path) -> "LanguageModelConfig":
    """What a language model's config.json says, without a look at its weights; CheckpointError."""
    return _parse(Path(directory) / "config.json", _language_model_config, "blt")


def language_model_fingerprint(directory: str | Path) -> str:
    """`fingerprint` of the BLT in a language model's directory, read a tensor at a time; CheckpointError."""
    root = Path(directory)
    config, weights = language_model_config(root).model, root / "model.safetensors"
    try:
        return _stored_fingerprint(config, weights)
    except FileNotFoundError as error:
        raise CheckpointError(f"{weights}: no such file; a checkpoint has its weights there") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{weights}: {_line(error)}") from error


def save_language_model(language_model: LanguageModel, directory: str | Path) -> None:
    """Write a language model that `load` reads; an existing one in `directory` is replaced.

    CheckpointError if `entropy_model` is not the one that `entropy_fingerprint` names (as after loading it in another
    dtype): the patches made with it would not be those the model was trained on.
    """
    root, stored = Path(directory), language_model.entropy_model
    found = None if stored is None else fingerprint(stored)
    expected = language_model.entropy_fingerprint or found
    if found is not None and found != expected:
        raise CheckpointError(
            f"{root}: the entropy model to be saved has fingerprint {found}, but the patches were made with "
            f"{expected}: load it in the dtype it was stored in"
        )
    if stored is not None:
        save_entropy_model(stored, root / "entropy_model", language_model.provenance)
    entropy: Json = None if expected is None else {"fingerprint": expected, "stored": stored is not None}
    keys: dict[str, Json] = {
        "patch_rule": to_json(language_model.patch_rule),
        "reset_on_newline": language_model.reset_on_newline,
        "entropy_model": entropy,
        "provenance": dict(language_model.provenance),
    }
    _write_model(language_model.model, root, "blt", keys)


def load(
    directory: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> LanguageModel:
    """The language model of a directory, BLT and entropy model both on `device` in `dtype`, ready to use or to train.

    Raises CheckpointError, naming the file, if one is missing or does not parse, is of another kind or format, lacks or
    exceeds the tensors of its configuration or has them in another shape, or if the entropy model is not the one that
    the language model was trained with.
    """
    root, place = Path(directory), torch.device(device)
    stored = language_model_config(root)
    model = _read_model(BLT, stored.model, root / "model.safetensors", place, dtype)
    entropy_model = None
    if stored.entropy_stored:
        entropy_model, found = _load_entropy_model(root / "entropy_model", place, dtype)
        if found != stored.entropy_fingerprint:
            raise CheckpointError(
                f"{root / 'entropy_model'}: the entropy model has fingerprint {found}, but {root / 'config.json'} "
                f"was made with {stored.entropy_fingerprint}"
            )
    return LanguageModel(
        model=model,
        entropy_model=entropy_model,
        patch_rule=stored.patch_rule,
        reset_on_newline=stored.reset_on_newline,
        config=stored.model,
        provenance=stored.provenance,
        entropy_fingerprint=stored.entropy_fingerprint,
    )


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
    """What config.json of a language model says: all but the weights."""

    model: BLTConfig
    patch_rule: PatchRule
    reset_on_newline: bool
    entropy_fingerprint: str | None
    entropy_stored: bool
    provenance: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class _StoredEntropyModel:
    """config.json's note of the entropy model: its fingerprint, and whether the directory holds it."""

    fingerprint: str
    stored: bool


def _language_model_config(values: Mapping[str, object]) -> LanguageModelConfig:
    _expect_keys(values, ("model", "patch_rule", "reset_on_newline", "entropy_model", "provenance"))
    reset, noted = values["reset_on_newline"], values["entropy_model"]
    if not isinstance(reset, bool):
        raise ValueError(f"key reset_on_newline must be true or false, got {reset!r}")
    entropy = None if noted is None else from_json(_StoredEntropyModel, noted, "entropy_model")
    return LanguageModelConfig(
        model=from_json(BLTConfig, values["model"], "model"),
        patch_rule=from_json(PatchRule, values["patch_rule"], "patch_rule"),
        reset_on_newline=reset,
        entropy_fingerprint=None if entropy is None else entropy.fingerprint,
        entropy_stored=entropy is not None and entropy.stored,
        provenance=_provenance(values["provenance"]),
    )


def _entropy_model_config(values: Mapping[str, object]) -> tuple[EntropyModelConfig, str]:
    _expect_keys(values, ("model", "fingerprint", "provenance"))
    _provenance(values["provenance"])
    return from_json(EntropyModelConfig, values["model"], "model"), _text(values, "fingerprint")


def _load_entropy_model(directory: Path, device: torch.device, dtype: torch.dtype) -> tuple[EntropyModel, str]:
    """The entropy model and the verified fingerprint of its stored weights."""
    config, stated = _parse(directory / "config.json", _entropy_model_config, "entropy_model")
    weights = directory / "model.safetensors"
    model = _read_model(EntropyModel, config, weights, device, dtype)
    found = _stored_fingerprint(config, weights)
    if found != stated:
        raise CheckpointError(
            f"{weights}: its tensors have fingerprint {found}, but {directory / 'config.json'} states {stated}"
        )
    return model, stated


def weights_fingerprint(config: object, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 (hex) of a configuration and of every tensor's name, dtype, shape and bytes, in the order given."""
    digest = hashlib.sha256(f"{type(config).__name__}{canonical_text(config)}".encode())
    for name, tensor in tensors:
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _stored_fingerprint(config: BLTConfig | EntropyModelConfig, weights: Path) -> str:
    with safe_open(weights, framework="pt") as file:
        return weights_fingerprint(config, ((name, file.get_tensor(name)) for name in sorted(file.keys())))


def _write_model(model: BLT | EntropyModel, directory: Path, kind: Kind, keys: dict[str, Json]) -> None:
    """Weights, then config.json with `keys` besides format, kind and model."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    replace_file(directory / "model.safetensors", lambda path: save_file(tensors, path, {"format": "pt"}))
    document = {"format": FORMAT, "kind": kind, "model": to_json(model.config), **keys}
    text = json.dumps(document, indent=2, allow_nan=False) + "\n"
    replace_file(directory / "config.json", lambda path: path.write_text(text, encoding="utf-8"))


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` make a temporary file beside `path`, then move it there in one step, readable as the umask says."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # what safetensors writes is for its owner alone
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def _parse(path: Path, parse: Callable[[Mapping[str, object]], Content], kind: Kind) -> Content:
    """`parse` of a config.json of the right format and kind, errors named by file."""
    try:
        values = json_object(json.loads(path.read_text(encoding="utf-8")), "of the file itself")
        if values.get("kind") != kind:
            raise ValueError(f"key kind must be {kind!r}, got {values.get('kind')!r}")
        if values.get("format") != FORMAT:
            raise ValueError(f"key format must be {FORMAT}, got {values.get('format')!r}: written by another version")
        return parse({key: value for key, value in values.items() if key not in ("kind", "format")})
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; a checkpoint of kind {kind} has one") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {_line(error)}") from error


def _read_model(
    build: Callable[[Config], AnyModel], config: Config, weights: Path, device: torch.device, dtype: torch.dtype
) -> AnyModel:
    """The model of `config` with the weights of a safetensors file."""
    try:
        return place(build, config, load_file(weights), device, dtype)
    except FileNotFoundError as error:
        raise CheckpointError(f"{weights}: no such file; a checkpoint has its weights there") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{weights}: {_line(error)}") from error


def _expect_keys(values: Mapping[str, object], names: tuple[str, ...]) -> None:
    for name in values:
        if name not in names:
            raise ValueError(f"unknown key {name}; known are {', '.join(('format', 'kind', *names))}")
    for name in names:
        if name not in values:
            raise ValueError(f"key {name} is missing")


def _text(values: Mapping[str, object], key: str) -> str:
    value = values.get(key)
    if not isinstance(value, str):
        raise ValueError(f"key {key} must be text, got {value!r}")
    return value


def _provenance(value: object) -> dict[str, str]:
    entries = json_object(value, "provenance")
    return {key: _text(entries, key) for key in entries}


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
