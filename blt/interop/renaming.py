"""Our parameters and another format's: the same numbers under other names, merged here and apart there.

Ours are concatenations along the first dimension (query, key and value in one matrix, gate and up in one, all hash
tables in one), so both directions are exact. A `Renaming` lists, for each of our parameters, the tensors it is made of
and their rows; `adopt` and `split` apply it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from blt.entropy_model import EntropyModelConfig
from blt.layers import TransformerConfig
from blt.model import BLTConfig
from blt.placement import AnyModel, Config, check_tensors, parameter_shapes, without_weights


@dataclass(frozen=True)
class Merged:
    """One parameter of ours, and the other format's tensors with the rows each has in it (None = all)."""

    ours: str
    theirs: tuple[str, ...]
    rows: tuple[int, ...] | None = None


Renaming = tuple[Merged, ...]


@dataclass(frozen=True, kw_only=True)
class Names:
    """What another format calls the parts of our models, without `.weight`."""

    attention: str
    """Prefix, inside a block, of the four that follow; in a cross-attention they stand without one."""
    query: str
    key: str
    value: str
    out: str
    gate: str
    up: str
    down: str
    attention_norm: str
    ffn_norm: str
    cross_norm_q: str
    cross_norm_kv: str
    byte_embedding: str
    model: str
    """Prefix of a BLT's parts, with its dot."""
    output: str
    """The BLT's output, with its prefix."""
    entropy_model: str
    """Prefix of an entropy model's parts, with its dot."""
    entropy_output: str
    """The entropy model's output, after its prefix."""
    one_hash_table: bool
    """All hash tables in one tensor, as ours, or each in its own."""


def same(ours: str, theirs: str) -> Merged:
    """A parameter that is one tensor in both."""
    return Merged(ours, (theirs,))


def blocks(ours: str, theirs: str, shape: TransformerConfig, names: Names) -> Renaming:
    """The blocks of a stack: `ours`.N and `theirs`.N."""
    merged: list[Merged] = []
    keys = shape.num_kv_heads * shape.head_width
    for layer in range(shape.layers):
        us, them = f"{ours}.{layer}", f"{theirs}.{layer}"
        qkv = tuple(f"{them}.{names.attention}.{part}.weight" for part in (names.query, names.key, names.value))
        merged += [
            same(f"{us}.attention_norm.weight", f"{them}.{names.attention_norm}.weight"),
            Merged(f"{us}.attention.wqkv.weight", qkv, (shape.width, keys, keys)),
            same(f"{us}.attention.wo.weight", f"{them}.{names.attention}.{names.out}.weight"),
            same(f"{us}.ffn_norm.weight", f"{them}.{names.ffn_norm}.weight"),
            Merged(
                f"{us}.feed_forward.w13.weight",
                (f"{them}.{names.gate}.weight", f"{them}.{names.up}.weight"),
                (shape.ffn_width, shape.ffn_width),
            ),
            same(f"{us}.feed_forward.w2.weight", f"{them}.{names.down}.weight"),
        ]
    return tuple(merged)


def cross_attentions(ours: str, theirs: str, count: int, width: int, names: Names) -> Renaming:
    """The cross-attentions of one side: `ours`.N and `theirs`.N."""
    merged: list[Merged] = []
    for layer in range(count):
        us, them = f"{ours}.{layer}", f"{theirs}.{layer}"
        merged += [
            same(f"{us}.norm_q.weight", f"{them}.{names.cross_norm_q}.weight"),
            same(f"{us}.norm_kv.weight", f"{them}.{names.cross_norm_kv}.weight"),
            same(f"{us}.wq.weight", f"{them}.{names.query}.weight"),
            Merged(f"{us}.wkv.weight", (f"{them}.{names.key}.weight", f"{them}.{names.value}.weight"), (width, width)),
            same(f"{us}.wo.weight", f"{them}.{names.out}.weight"),
        ]
    return tuple(merged)


def entropy_renaming(config: EntropyModelConfig, names: Names) -> Renaming:
    """Every parameter of an entropy model."""
    prefix = names.entropy_model
    return (
        same("byte_embedding.weight", f"{prefix}{names.byte_embedding}.weight"),
        *blocks("blocks", f"{prefix}layers", config.transformer, names),
        same("norm.weight", f"{prefix}norm.weight"),
        same("output.weight", f"{prefix}{names.entropy_output}.weight"),
    )


def blt_renaming(config: BLTConfig, names: Names) -> Renaming:
    """Every parameter of a BLT."""
    width, latent = config.local_encoder.width, config.latent
    theirs = f"{names.model}global_transformer"
    merged = list(_encoder_renaming(config, names))
    if config.cross_attention.slots * width != latent.width:
        merged.append(same("latent.projection.weight", f"{theirs}.token_embedding_projection.weight"))
    merged += blocks("latent.blocks", f"{theirs}.layers", latent, names)
    return (*merged, *_decoder_renaming(config, names))


def _encoder_renaming(config: BLTConfig, names: Names) -> Renaming:
    shape, hashes = config.local_encoder, config.hash_embedding
    ours, theirs = "local_encoder", f"{names.model}local_encoder"
    merged = [same(f"{ours}.byte_embedding.weight", f"{theirs}.{names.byte_embedding}.weight")]
    tables = f"{names.model}encoder_hash_tok_embedding"
    num_tables = hashes.functions * len(hashes.group_sizes)
    if num_tables and names.one_hash_table:
        merged.append(same(f"{ours}.hash_embedding.table", f"{tables}.weight"))
    elif num_tables:
        each = tuple(f"{tables}.{n}.weight" for n in range(num_tables))
        merged.append(Merged(f"{ours}.hash_embedding.table", each, (hashes.table_size,) * num_tables))
    num_cross = {"all": shape.layers, "last": 1, "none": 0}[config.cross_attention.encoder_layers]
    if num_cross:
        merged.append(same(f"{ours}.slot_projection.weight", f"{theirs}.patch_embedding_projection.weight"))
    return (
        *merged,
        *blocks(f"{ours}.blocks", f"{theirs}.layers", shape, names),
        *cross_attentions(f"{ours}.cross_attention", f"{theirs}.cross_attn_layers", num_cross, shape.width, names),
    )


def _decoder_renaming(config: BLTConfig, names: Names) -> Renaming:
    shape = config.local_decoder
    ours, theirs = "local_decoder", f"{names.model}local_decoder"
    merged = [
        same(f"{ours}.norm.weight", f"{theirs}.norm.weight"),
        same(f"{ours}.output.weight", f"{names.output}.weight"),
    ]
    if config.latent.width != shape.width:
        merged.append(same(f"{ours}.projection.weight", f"{theirs}.patch_embedding_projection.weight"))
    num_cross = {"all": shape.layers, "first": min(1, shape.layers), "none": 0}[config.cross_attention.decoder_layers]
    return (
        *merged,
        *blocks(f"{ours}.blocks", f"{theirs}.layers", shape, names),
        *cross_attentions(f"{ours}.cross_attention", f"{theirs}.cross_attn_layers", num_cross, shape.width, names),
    )


def split(state: Mapping[str, Tensor], renaming: Renaming) -> dict[str, Tensor]:
    """The other format's tensors of our state: contiguous copies of our values."""
    tensors: dict[str, Tensor] = {}
    for entry in renaming:
        whole = state[entry.ours].detach()
        parts = [whole] if entry.rows is None else torch.split(whole, list(entry.rows))
        tensors.update({name: part.clone() for name, part in zip(entry.theirs, parts, strict=True)})
    return tensors


def adopt(
    build: Callable[[Config], AnyModel],
    config: Config,
    tensors: Mapping[str, Tensor],
    renaming: Renaming,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> AnyModel:
    """Our model with the other format's tensors, in `dtype`, or if None in the dtype that all of them have (float32 if
    they differ).

    ValueError, by the other format's names, if tensors are missing, unexpected, or of another shape.
    """
    shapes = parameter_shapes(build, config)
    check_tensors(tensors, their_shapes(renaming, shapes))
    dtypes = {tensor.dtype for tensor in tensors.values()}
    stored = dtypes.pop() if len(dtypes) == 1 else torch.float32
    model = without_weights(build, config, device, stored if dtype is None else dtype)
    parameters = model.state_dict()
    with torch.no_grad():
        for entry in renaming:
            # Part by part into its rows, so that the weights of a mapped file are in memory once.
            sizes = [len(tensors[name]) for name in entry.theirs]
            for name, rows in zip(entry.theirs, parameters[entry.ours].split(sizes), strict=True):
                rows.copy_(tensors[name])
    return model


def their_shapes(renaming: Renaming, shapes: Mapping[str, torch.Size]) -> dict[str, tuple[int, ...]]:
    """Shape of each of the other format's tensors, from those of our parameters."""
    return {
        name: (shapes[entry.ours][0] if entry.rows is None else entry.rows[i], *shapes[entry.ours][1:])
        for entry in renaming
        for i, name in enumerate(entry.theirs)
    }
