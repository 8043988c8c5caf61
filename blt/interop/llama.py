"""A Llama in transformers' format as what the latent transformer of a BLT starts from.

    DIR/config.json                    of model_type llama
    DIR/model.safetensors, or its index and the parts that it names

In: the directory and the shape of the BLT. Out: the weights of its blocks, under our names and in our layout; nothing
is unpickled, and nothing of transformers imported. Its embeddings, its final norm and its output have no place in a
latent transformer and are left out; any other tensor that is not placed is an error. Source: arXiv 2412.09871, on
starting from Llama 3.1.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from blt.checkpoint import weights_fingerprint
from blt.config_json import json_object
from blt.errors import CheckpointError, ConfigError
from blt.interop.arguments import Arguments
from blt.interop.renaming import Renaming, blocks, their_shapes
from blt.interop.rotary import COMPUTED, partial_rotary_factor, read_rope, rope_type
from blt.interop.transformers import NAMES, weights_path
from blt.interop.transformers_config import ffn_rule
from blt.interop.weights import read_tensors
from blt.layers import RopeScaling, TransformerConfig
from blt.model import BLT, BLTConfig
from blt.placement import check_tensors, parameter_shapes

_OURS = "latent.blocks"
_LEFT_OUT = ("embed_tokens.weight", "norm.weight")
_OUTPUT = "lm_head.weight"
_ANGLES = ".self_attn.rotary_emb.inv_freq"
"""Kept by old files, and computed from rope_theta by all."""


@dataclass(frozen=True, kw_only=True)
class LlamaBlocks:
    """The blocks of a Llama that has the shape of a BLT's latent transformer."""

    shape: TransformerConfig
    renaming: Renaming
    tensors: Mapping[str, Tensor]
    """By its own names, as they are stored, memory-mapped."""
    left_out: tuple[str, ...]
    """Names of the tensors that have no place."""

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the shape and of the name, dtype, shape and bytes of each tensor that is placed, in whatever
        files they are."""
        return weights_fingerprint(self.shape, sorted(self.tensors.items()))

    @property
    def parameters(self) -> int:
        """Numbers that are placed."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    def place(self, state: Mapping[str, Tensor]) -> None:
        """Write the blocks into a BLT's tensors by our names, in place; all others stay."""
        with torch.no_grad():
            for entry in self.renaming:
                parts = [self._in_our_layout(name) for name in entry.theirs]
                sizes = [len(part) for part in parts]
                for part, rows in zip(parts, state[entry.ours].split(sizes), strict=True):
                    rows.copy_(part)

    def layer_map(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """For each of our parameters of a block: its name there and here, inside a layer, and its shape here."""
        for entry in self.renaming:
            if entry.ours.startswith(f"{_OURS}.0."):
                rows = sum(len(self.tensors[name]) for name in entry.theirs)
                shape = (rows, *self.tensors[entry.theirs[0]].shape[1:])
                yield _as_one([_in_layer(name) for name in entry.theirs]), _in_layer(entry.ours), shape

    def _in_our_layout(self, name: str) -> Tensor:
        heads = {NAMES.query: self.shape.heads, NAMES.key: self.shape.num_kv_heads}.get(name.split(".")[-2])
        return self.tensors[name] if heads is None else interleaved(self.tensors[name], heads)


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys [heads * K, D] for rotary pairs (2i, 2i + 1), from those for pairs (i, i + K / 2)."""
    pairs: Tensor = rows.unflatten(0, (heads, 2, -1))
    return pairs.transpose(1, 2).flatten(0, 2)


def llama_blocks(directory: str | Path, model: BLTConfig) -> LlamaBlocks:
    """The blocks of the Llama in `directory`, for the latent transformer of `model`.

    ConfigError, naming each key with its value there and here, for a Llama of another shape, or one whose numbers are
    not computed here (rotary angles scaled otherwise than Llama 3.1's, biases). CheckpointError, naming the file, for
    what is missing or broken, and for tensors that are missing, unexpected, or of the wrong shape.
    """
    root, shape = Path(directory), model.latent
    path = root / "config.json"
    try:
        values = json_object(json.loads(path.read_text(encoding="utf-8")), "of the file itself")
        differing = list(_differences(values, shape))
        if not differing:
            path = weights_path(root)
            return _blocks(read_tensors(path), model)
    except FileNotFoundError as error:
        hint = "; weights are read from safetensors files alone" if path.name != "config.json" else ""
        raise CheckpointError(f"{error.filename or path}: no such file{hint}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {' '.join(str(error).split())}") from error
    raise ConfigError(f'{path} does not fit the key "model.latent": {"; ".join(differing)}')


def _blocks(stored: Mapping[str, Tensor], model: BLTConfig) -> LlamaBlocks:
    """ValueError naming tensors that are missing, unexpected, or of the wrong shape."""
    prefix = "model." if any(name.startswith("model.") for name in stored) else ""
    renaming = blocks(_OURS, f"{prefix}layers", model.latent, NAMES)
    passed_over = {_OUTPUT, *(f"{prefix}{name}" for name in _LEFT_OUT)}
    left_out = tuple(name for name in sorted(stored) if name in passed_over or name.endswith(_ANGLES))
    tensors = {name: tensor for name, tensor in stored.items() if name not in left_out}
    check_tensors(tensors, their_shapes(renaming, parameter_shapes(BLT, model)))
    return LlamaBlocks(shape=model.latent, renaming=renaming, tensors=tensors, left_out=left_out)


def _differences(values: Mapping[str, object], shape: TransformerConfig) -> Iterator[str]:
    """What of a config.json has no like in the shape. ValueError for a value of the wrong type. Absent keys have the
    defaults of transformers' LlamaConfig."""
    llama = Arguments(values, (), {})
    if (kind := llama.given("model_type")) != "llama":
        yield f"model_type is {kind!r} there, only 'llama' is read here"
        return
    width, heads = llama.integer("hidden_size", 4096), llama.integer("num_attention_heads", 32)
    ffn_width, ours = llama.integer("intermediate_size", 11008), "latent's feed-forward width"
    kind_of_angles = rope_type(values)
    rope_theta, scaling = read_rope(values, 10000.0) if kind_of_angles in COMPUTED else (shape.rope_theta, None)
    for key, there, name, here in (
        ("hidden_size", width, "latent.width", shape.width),
        ("num_hidden_layers", llama.integer("num_hidden_layers", 32), "latent.layers", shape.layers),
        ("num_attention_heads", heads, "latent.heads", shape.heads),
        ("num_key_value_heads", llama.integer("num_key_value_heads", heads), "latent.kv_heads", shape.num_kv_heads),
        ("head_dim", llama.integer("head_dim", width // max(heads, 1)), "latent.width / heads", shape.head_width),
        ("intermediate_size", ffn_width, ours, shape.ffn_width),
        ("rms_norm_eps", llama.number("rms_norm_eps", 1e-6), "latent.norm_eps", shape.norm_eps),
        ("rope_theta", rope_theta, "latent.rope_theta", shape.rope_theta),
        ("rope_scaling", _told(scaling), "latent.rope_scaling", _told(shape.rope_scaling)),
    ):
        if there != here:
            yield f"{key} is {there} there, {name} is {here} here{_ffn_hint(shape, ffn_width) if name == ours else ''}"
    only: dict[str, tuple[object, object]] = {
        "partial_rotary_factor": (partial_rotary_factor(values), 1.0),
        "hidden_act": (llama.given("hidden_act") or "silu", "silu"),
        "attention_bias": (llama.flag("attention_bias", False), False),
        "mlp_bias": (llama.flag("mlp_bias", False), False),
        "quantization_config": (llama.given("quantization_config"), None),
    }
    if kind_of_angles not in COMPUTED:
        yield f"rope_type is {kind_of_angles!r} there, and can only be {' or '.join(map(repr, COMPUTED))} here"
    for key, (value, computed) in only.items():
        if value != computed:
            yield f"{key} is {value!r} there, and can only be {computed!r} here"


def _told(scaling: RopeScaling | None) -> str:
    """`factor=8.0 low_freq_factor=1.0 ...`, the keys that would give it."""
    return "null" if scaling is None else " ".join(f"{name}={value}" for name, value in asdict(scaling).items())


def _ffn_hint(shape: TransformerConfig, ffn_width: int) -> str:
    multiplier, multiple_of = ffn_rule(int(2 * (4 * shape.width) / 3), ffn_width)
    told = "null" if multiplier is None else f"{multiplier:.9g}"
    return f" (ffn_multiplier={told} ffn_multiple_of={multiple_of} would give {ffn_width})"


def _in_layer(name: str) -> str:
    """Without the layer, and without `.weight`, with which all end."""
    return name.partition(".0.")[2].removesuffix(".weight")


def _as_one(names: Sequence[str]) -> str:
    """`self_attn.{q,k,v}_proj` for those that are one matrix here."""
    if len(names) == 1:
        return names[0]
    parts = [name.removesuffix("_proj").rpartition(".") for name in names]
    return f"{parts[0][0]}.{{{','.join(kind for _, _, kind in parts)}}}_proj"
