"""The oracle: the entropy model and the BLT written from the paper and the published models as plainly as they can be.

One row at a time, Python loops for everything that is decided per byte or patch (documents, patches, masks, hashes),
and dense T x T and P*k x T masks for everything that attends. Slow and quadratic on purpose; nothing is shared with
`blt` but the names and shapes of parameters, the configurations and the list of hash primes. In: parameters by the
names of `named_parameters()`, ids and lengths as the models take them. Out: logits [B,T,V] for autograd.

Where `document_ids` are given, documents are isolated: attention of bytes and of patches stays inside a document,
positions and hash windows restart. Where they are not, as published: an EOS closes a block, all else runs on.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from blt.entropy_model import EntropyModelConfig
from blt.hash_embedding import PRIMES
from blt.layers import RopeScaling, TransformerConfig
from blt.model import BLTConfig

EOS = 2
Parameters = Mapping[str, Tensor]


def entropy_logits(
    config: EntropyModelConfig, parameters: Parameters, byte_ids_BT: Tensor, document_ids_BT: Tensor | None
) -> Tensor:
    """Logits [B,T,V] of the entropy model."""
    rows = []
    for row in range(byte_ids_BT.shape[0]):
        byte_ids = byte_ids_BT[row].tolist()
        given = None if document_ids_BT is None else document_ids_BT[row].tolist()
        documents, positions = byte_documents(byte_ids, given)
        mask = causal_mask(documents, config.transformer.window)
        x = parameters["byte_embedding.weight"][byte_ids]
        x = transformer(config.transformer, within(parameters, "blocks."), x, mask, positions)
        x = rms_norm(x, parameters["norm.weight"], config.transformer.norm_eps)
        rows.append(x @ parameters["output.weight"].T)
    return torch.stack(rows)


def blt_logits(
    config: BLTConfig,
    parameters: Parameters,
    byte_ids_BT: Tensor,
    patch_lengths_BP: Tensor,
    document_ids_BT: Tensor | None,
) -> Tensor:
    """Logits [B,T,V] of the BLT."""
    rows = []
    for row in range(byte_ids_BT.shape[0]):
        given = None if document_ids_BT is None else document_ids_BT[row].tolist()
        rows.append(_blt_row(config, parameters, byte_ids_BT[row].tolist(), patch_lengths_BP[row].tolist(), given))
    return torch.stack(rows)


def _blt_row(
    config: BLTConfig, parameters: Parameters, byte_ids: list[int], patch_lengths: list[int], given: list[int] | None
) -> Tensor:
    cross, num_patches = config.cross_attention, len(patch_lengths)
    documents, positions = byte_documents(byte_ids, given)
    patch_of = [patch for patch, length in enumerate(patch_lengths) for _ in range(length)]  # T + 1: next byte too
    members = [[i for i in range(len(byte_ids)) if patch_of[i] == patch] for patch in range(num_patches)]
    encoder, decoder = within(parameters, "local_encoder."), within(parameters, "local_decoder.")

    h = encoder["byte_embedding.weight"][byte_ids]
    if config.hash_embedding.group_sizes:
        h = h + hash_embeddings(config, encoder["hash_embedding.table"], byte_ids, None if given is None else documents)
    mask = causal_mask(documents, config.local_encoder.window)
    slots: Tensor | None = None
    for layer in range(config.local_encoder.layers):
        h = block(config.local_encoder, within(encoder, f"blocks.{layer}."), h, mask, positions)
        if cross.encoder_layers == "all":
            slots = _read_bytes(config, encoder, layer, slots, h, members)
    if cross.encoder_layers == "last":
        slots = _read_bytes(config, encoder, 0, slots, h, members)
    if slots is None:
        slots = pool(h, members, cross.pooling)

    x = slots.reshape(num_patches, -1)  # the k slots of a patch side by side
    latent = within(parameters, "latent.")
    if "projection.weight" in latent:
        x = x @ latent["projection.weight"].T
    patch_documents, patch_positions = _patch_documents(byte_ids, members, given)
    x = transformer(config.latent, within(latent, "blocks."), x, causal_mask(patch_documents, None), patch_positions)

    if "projection.weight" in decoder:
        x = x @ decoder["projection.weight"].T
    read = [patch_of[i + 1] - 1 for i in range(len(byte_ids))]  # newest patch that is complete at byte i
    if cross.decoder_layers == "none":
        h = h + x[read]
    slots = x.reshape(-1, config.local_decoder.width)
    per_patch = slots.shape[0] // num_patches
    sees = torch.tensor([[slot // per_patch == read[i] for slot in range(len(slots))] for i in range(len(byte_ids))])
    mask = causal_mask(documents, config.local_decoder.window)
    for layer in range(config.local_decoder.layers):
        if cross.decoder_layers == "all" or (cross.decoder_layers == "first" and layer == 0):
            weights = within(decoder, f"cross_attention.{layer}.")
            attended = cross_attention(cross.heads, config.local_decoder.norm_eps, weights, h, slots, sees)
            h = h + (h + attended)  # the residual counts twice
        h = block(config.local_decoder, within(decoder, f"blocks.{layer}."), h, mask, positions)
    h = rms_norm(h, decoder["norm.weight"], config.local_decoder.norm_eps)
    return h @ decoder["output.weight"].T


def _read_bytes(
    config: BLTConfig, encoder: Parameters, layer: int, slots: Tensor | None, h: Tensor, members: list[list[int]]
) -> Tensor:
    """Slots [P*k,D] after one encoder cross-attention; made by pooling where there are none yet."""
    k, width = config.cross_attention.slots, config.local_encoder.width
    if slots is None:
        slots = (pool(h, members, config.cross_attention.pooling) @ encoder["slot_projection.weight"].T).reshape(
            -1, width
        )
    sees = torch.tensor([[i in members[slot // k] for i in range(len(h))] for slot in range(len(slots))])
    weights = within(encoder, f"cross_attention.{layer}.")
    attended = cross_attention(config.cross_attention.heads, config.local_encoder.norm_eps, weights, slots, h, sees)
    return slots + (slots + attended)  # the residual counts twice


def _patch_documents(
    byte_ids: list[int], members: list[list[int]], given: list[int] | None
) -> tuple[list[int], list[int]]:
    """Block number and position of each patch; a patch without bytes stands alone where document ids are given."""
    blocks: list[int] = []
    number = 0
    if given is None:
        for patch in members:
            blocks.append(number)
            number += any(byte_ids[i] == EOS for i in patch)
        return blocks, list(range(len(members)))
    before: int | None = None
    positions: list[int] = []
    for patch in members:
        here = given[patch[0]] if patch else None
        same = here is not None and here == before
        number += not same
        blocks.append(number)
        positions.append(positions[-1] + 1 if same else 0)
        before = here
    return blocks, positions


def byte_documents(byte_ids: list[int], given: list[int] | None) -> tuple[list[int], list[int]]:
    """Block number and rotary position of each byte."""
    blocks: list[int] = []
    positions: list[int] = []
    for i in range(len(byte_ids)):
        if given is None:
            opens = i > 0 and byte_ids[i - 1] == EOS
            positions.append(i)
        else:
            opens = i > 0 and given[i] != given[i - 1]
            positions.append(0 if opens or i == 0 else positions[-1] + 1)
        blocks.append((blocks[-1] if blocks else 0) + opens)
    return blocks, positions


def causal_mask(blocks: Sequence[int], window: int | None) -> Tensor:
    """Bool [N,N]: query i sees key j iff same block and i - window < j <= i."""
    reach = len(blocks) if window is None else window
    places = range(len(blocks))
    return torch.tensor([[blocks[i] == blocks[j] and i - reach < j <= i for j in places] for i in places])


def hash_embeddings(config: BLTConfig, table: Tensor, byte_ids: list[int], documents: list[int] | None) -> Tensor:
    """Sum of one table row per function and size [T,D]; ids left of the row (or of the document) count as 0."""
    hashes = config.hash_embedding
    total = torch.zeros(len(byte_ids), table.shape[1], dtype=table.dtype)
    number = 0
    for function in range(hashes.functions):
        for size in hashes.group_sizes:
            rows = []
            for i in range(len(byte_ids)):
                places = range(i - size + 1, i + 1)
                seen = [j >= 0 and (documents is None or documents[j] == documents[i]) for j in places]
                window = [byte_ids[j] if ok else 0 for j, ok in zip(places, seen, strict=True)]
                value = sum(w * PRIMES[function] ** power for power, w in enumerate(window))
                signed = (value + 2**63) % 2**64 - 2**63
                rows.append(number * hashes.table_size + signed % hashes.table_size)
            total = total + table[rows]
            number += 1
    return total


def pool(h: Tensor, members: list[list[int]], pooling: str) -> Tensor:
    """One vector per patch [P,D]; a patch without bytes gives 0."""
    reduce = {"max": lambda rows: rows.amax(0), "min": lambda rows: rows.amin(0), "mean": lambda rows: rows.mean(0)}
    return torch.stack([reduce[pooling](h[patch]) if patch else torch.zeros_like(h[0]) for patch in members])


def transformer(
    config: TransformerConfig, parameters: Parameters, x: Tensor, mask: Tensor, positions: list[int]
) -> Tensor:
    for layer in range(config.layers):
        x = block(config, within(parameters, f"{layer}."), x, mask, positions)
    return x


def block(config: TransformerConfig, weights: Parameters, x: Tensor, mask: Tensor, positions: list[int]) -> Tensor:
    """x += attention(norm(x)); x += w2(silu(w1 norm(x)) * w3 norm(x))."""
    kv_width = (config.kv_heads or config.heads) * (config.width // config.heads)
    wq, wk, wv = weights["attention.wqkv.weight"].split([config.width, kv_width, kv_width])
    normed = rms_norm(x, weights["attention_norm.weight"], config.norm_eps)
    q, k, v = (heads_of(normed @ w.T, config.width // config.heads) for w in (wq, wk, wv))
    repeats = config.heads // len(k)
    q, k = rotary(q, positions, config), rotary(k, positions, config)
    out = [attend(q[head], k[head // repeats], v[head // repeats], mask) for head in range(config.heads)]
    x = x + torch.cat(out, -1) @ weights["attention.wo.weight"].T
    normed = rms_norm(x, weights["ffn_norm.weight"], config.norm_eps)
    w1, w3 = weights["feed_forward.w13.weight"].chunk(2)
    return x + (F.silu(normed @ w1.T) * (normed @ w3.T)) @ weights["feed_forward.w2.weight"].T


def cross_attention(
    heads: int, eps: float, weights: Parameters, queries: Tensor, source: Tensor, sees: Tensor
) -> Tensor:
    """Attention of queries [Q,D] over a source [S,D] under a bool mask [Q,S]; no residual, no rotary positions."""
    head_width = queries.shape[-1] // heads
    normed = rms_norm(source, weights["norm_kv.weight"], eps)
    wk, wv = weights["wkv.weight"].chunk(2)
    q = heads_of(rms_norm(queries, weights["norm_q.weight"], eps) @ weights["wq.weight"].T, head_width)
    k, v = heads_of(normed @ wk.T, head_width), heads_of(normed @ wv.T, head_width)
    out = [attend(q[head], k[head], v[head], sees) for head in range(heads)]
    return torch.cat(out, -1) @ weights["wo.weight"].T


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Softmax attention of one head; a query that sees nothing gives 0."""
    out = torch.zeros(len(q), v.shape[1], dtype=v.dtype)
    some = mask.any(1)
    scores = (q[some] @ k.T) / math.sqrt(q.shape[1])
    out[some] = torch.softmax(scores.masked_fill(~mask[some], -torch.inf), -1) @ v
    return out


def scaled_frequency(frequency: Tensor, scaling: RopeScaling) -> Tensor:
    """One pair's frequency as Llama 3.1 scales it, in the order of operations that transformers has."""
    turns = scaling.original_max_position_embeddings / (2 * math.pi / frequency)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    if turns > high:
        return frequency
    if turns < low:
        return frequency / scaling.factor
    smooth = (turns - low) / (high - low)
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency


def rotary(x_HNK: Tensor, positions: list[int], config: TransformerConfig) -> Tensor:
    """Rotation of pairs (x[2i], x[2i + 1]) by position * theta ** (-2i / K), scaled where the stack's angles are.

    Angles, cosines and sines are float32 by design, so a float64 comparison needs the same float32
    values; `test_attention.py` holds them to float64 ones.
    """
    head_width = x_HNK.shape[-1]
    frequencies = 1.0 / (config.rope_theta ** (torch.arange(0, head_width, 2).float() / head_width))
    if (scaling := config.rope_scaling) is not None:
        frequencies = torch.stack([scaled_frequency(frequency, scaling) for frequency in frequencies])
    angles = torch.tensor(positions).float()[:, None] * frequencies
    turned = torch.polar(torch.ones_like(angles), angles)
    cos, sin = turned.real.to(x_HNK.dtype), turned.imag.to(x_HNK.dtype)
    even, odd = x_HNK[..., 0::2], x_HNK[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def heads_of(x_ND: Tensor, head_width: int) -> Tensor:
    """[H,N,K] of [N,H*K]."""
    return torch.stack(x_ND.split(head_width, -1))


def within(parameters: Parameters, prefix: str) -> dict[str, Tensor]:
    """The parameters under a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in parameters.items() if name.startswith(prefix)}
