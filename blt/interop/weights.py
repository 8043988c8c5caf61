"""Tensors of another format's files by name, read without running code from them: safetensors, or a restricted pickle.

In: one safetensors file, the index of several, or a torch file. Out: the tensors as they are stored, memory-mapped, so
that only what is copied from them is read. All faults are ValueErrors of one line, or the OSError of the system.
"""

import errno
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from blt.config_json import json_object

_STATE_KEYS = ("model", "state_dict")
"""Under which a torch file may hold the weights, beside an optimiser's state and the like."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, of those that an index (.json) names, or of a torch file (.pth, .pt)."""
    if path.suffix == ".json":
        return _indexed(path)
    return _torch_file(path) if path.suffix in (".pth", ".pt") else _safetensors(path)


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from error  # its own has no name
    except SafetensorError as error:
        raise ValueError(f"{path.name} is no whole safetensors file: {_first_line(error)}") from error


def _indexed(path: Path) -> dict[str, Tensor]:
    """The tensors of the files that an index names; each must be in the file that it is said to be in."""
    index = json_object(json.loads(path.read_text(encoding="utf-8")), "of the file itself")
    weight_map = json_object(index.get("weight_map"), "weight_map")
    tensors: dict[str, Tensor] = {}
    for file in sorted({str(file) for file in weight_map.values()}):
        if Path(file).name != file:
            raise ValueError(f"key weight_map must name files of the same directory, got {file!r}")
        found = _safetensors(path.with_name(file))
        if misplaced := sorted(name for name in found if weight_map.get(name) != file):
            raise ValueError(f"key weight_map does not say that {file} holds {_listed(misplaced)}")
        tensors |= found
    if missing := [name for name in weight_map if name not in tensors]:
        raise ValueError(f"key weight_map names tensors that are in none of its files: {_listed(missing)}")
    return tensors


def _torch_file(path: Path) -> dict[str, Tensor]:
    """The state dict of a torch file: it alone, or under `model` or `state_dict`."""
    path.open("rb").close()  # a file that cannot be opened is the system's fault to name, all else is the file's
    try:
        # Only files in torch's zip format can be mapped; the older ones are read into memory.
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a restricted unpickler stumbles in many ways over a broken or hostile file
        raise ValueError(
            f"{path.name} does not hold tensors alone, or is broken; nothing else is unpickled, as that could run "
            f"code from the file ({type(error).__name__}: {_cause(error)})"
        ) from error
    state = next((loaded[key] for key in _STATE_KEYS if _is_mapping_with(loaded, key)), loaded)
    if not isinstance(state, Mapping):
        raise ValueError(f"{path.name} holds a {type(loaded).__name__} instead of tensors by name")
    if odd := [str(name) for name, value in state.items() if not (isinstance(name, str) and _is_plain(value))]:
        raise ValueError(f"{path.name} holds what is no ordinary tensor: {_listed(odd)}")
    return dict(state)


def _cause(error: Exception) -> str:
    """What the restricted unpickler met, in one sentence, without torch's advice to lift the restriction."""
    _, found, met = str(error).partition("WeightsUnpickler error:")
    lines = [line.strip() for line in (met if found else str(error)).splitlines()]
    return next((line.split(". ")[0][:200] for line in lines if line and "weights_only" not in line), "")


def _is_mapping_with(value: object, key: str) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get(key), Mapping)


def _is_plain(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided and not (value.is_meta or value.is_quantized)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
