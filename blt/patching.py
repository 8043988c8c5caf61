"""Patching: byte ids and next-byte entropies in, patch starts and patch lengths out. Pure functions, one for each rule.

Shapes: B rows, T bytes of a row, M = T or T + 1 positions (`include_next` adds the virtual next byte), P patches.
Entropies are nats; H_i is made at byte i and is the uncertainty of byte i + 1, so it decides whether i + 1 starts a
patch. Memory is a few tensors of B x M for every rule.
Source: BLT (arXiv 2412.09871) section 2; edge cases as the published implementation computes them.
"""

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from blt import vocabulary
from blt.config_json import ADDED_LATER
from blt.errors import ConfigError

Kind = Literal["entropy", "space", "fixed", "byte", "top_k"]

ENTROPY_STEPS_PER_NAT = 32
"""Steps of a stored entropy per nat: a step is fine enough for every useful threshold, and 260 ids fit into a byte."""

_INTEGER_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True, kw_only=True)
class PatchRule:
    """How a document is cut into patches.

    - `entropy`: byte i + 1 starts a patch if H_i > `threshold`; with `monotonic` if H_i - H_{i-1} > `threshold` (paper
      section 2.3, approximate monotonicity); with `threshold_add`, if H_i > `threshold` and H_i - H_{i-1} >
      `threshold_add`. `monotonic` goes before `threshold_add` where both are set.
    - `space`: a patch ends at the first of a run of bytes that are neither digit, letter nor UTF-8 continuation.
    - `fixed`: every patch has `patch_size` bytes.
    - `byte`: every byte is a patch.
    - `top_k`: the T // `patch_size` - 2 bytes of the highest preceding entropy start patches. It looks ahead.

    Positions 0 (normally BOS) and 1 start patches under every rule but `fixed`. A value not accepted is a ConfigError.
    """

    kind: Kind = "entropy"
    """Which rule: entropy, space, fixed, byte or top_k."""
    threshold: float = 1.335442066192627
    """Entropy (nats), or with `monotonic` its rise, above which a patch starts; used by entropy."""
    threshold_add: float | None = None
    """Rise of entropy (nats) that is demanded besides `threshold`; None demands no rise; used by entropy."""
    monotonic: bool = False
    """Compare the rise H_i - H_{i-1} instead of H_i with `threshold`; used by entropy."""
    patch_size: float | None = None
    """Bytes per patch: a whole number for fixed, the mean aimed at for top_k; the other kinds do not use it."""
    max_patch_length: int | None = None
    """Longest patch in bytes: a longer one is cut into pieces of this length and a remainder; None sets no limit."""
    quantized: bool = field(default=False, metadata=ADDED_LATER)
    """Round entropies up to multiples of 1/32 nat before they are compared, as a dataset stores them; used by entropy
    and top_k."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ConfigError(f"patch rule: kind must be one of {', '.join(get_args(Kind))}, got {self.kind!r}")
        for name in ("threshold", "threshold_add", "patch_size"):
            value = getattr(self, name)
            if not (_is_number(value) or (value is None and name != "threshold")):
                raise ConfigError(f"patch rule: {name} must be a number, got {value!r}")
        if self.patch_size is None and self.kind in ("fixed", "top_k"):
            raise ConfigError(f"patch rule: kind {self.kind} needs patch_size (bytes per patch)")
        if self.patch_size is not None and not 1 <= self.patch_size < math.inf:
            raise ConfigError(f"patch rule: patch_size must be at least 1 and finite, got {self.patch_size}")
        if self.kind == "fixed" and self.patch_size != int(self.patch_size or 0):
            raise ConfigError(f"patch rule: patch_size must be a whole number for kind fixed, got {self.patch_size}")
        if self.max_patch_length is not None and not _is_count(self.max_patch_length):
            raise ConfigError(f"patch rule: max_patch_length must be a whole number > 0, got {self.max_patch_length!r}")

    @property
    def needs_entropies(self) -> bool:
        """Whether the rule reads next-byte entropies, and so needs an entropy model."""
        return self.kind in ("entropy", "top_k")


def patch_lengths(byte_ids: Tensor, entropies: Tensor | None, rule: PatchRule, include_next: bool = False) -> Tensor:
    """Patch lengths of each row, int64 [P] or [B, P] for ids of [T] or [B, T], with zeros after a row's last patch.

    `entropies` (nats, the shape of the ids, any float dtype) may be None for kinds that do not read them; comparisons
    are made in their dtype, in float32 if the rule is quantized. Rows are full: there is no padding id. Lengths sum to
    T, or to T + 1 with `include_next`, which counts the virtual byte after the row; T = 0 gives rows without a patch.
    H_0 is never read. Inputs of the wrong shape or dtype, ids outside 0..259 and NaN entropies are a ValueError.
    """
    _check_values(byte_ids, entropies, rule)
    starts = patch_starts(byte_ids, entropies, rule, include_next)
    if byte_ids.shape[-1] == 0:
        starts = starts[..., :0]
    lengths = starts_to_lengths(starts if starts.ndim == 2 else starts[None])
    return lengths if starts.ndim == 2 else lengths[0]


def patch_starts(byte_ids: Tensor, entropies: Tensor | None, rule: PatchRule, include_next: bool = False) -> Tensor:
    """Bool [M] or [B, M]: True where a byte starts a patch; M = T, or T + 1 with `include_next`.

    As `patch_lengths`, but without its look at values (ids outside 0..259, NaN), so that nothing waits for a device.
    """
    _check_shapes(byte_ids, entropies, rule)
    ids_BT = byte_ids if byte_ids.ndim == 2 else byte_ids[None]
    entropies_BT = entropies[None] if entropies is not None and entropies.ndim == 1 else entropies
    num_positions = ids_BT.shape[1] + int(include_next)
    if rule.kind in ("fixed", "byte"):
        patch_size = int(rule.patch_size or 1) if rule.kind == "fixed" else 1
        position_M = torch.arange(num_positions, device=ids_BT.device)
        starts_BM = (position_M % patch_size == 0).repeat(ids_BT.shape[0], 1)
    else:
        starts_BM = _starts_after(_decisions(ids_BT, entropies_BT, rule), num_positions)
    if rule.max_patch_length is not None:
        starts_BM = _split_long(starts_BM, rule.max_patch_length)
    return starts_BM if byte_ids.ndim == 2 else starts_BM[0]


def document_patch_starts(document: bytes, entropies: Tensor | None, rule: PatchRule) -> Tensor:
    """Bool [n + 1] for a document of n bytes: entry i says whether byte i starts a patch, the last whether EOS does.

    `entropies` [n + 1] (nats): entry 0 made at BOS, entry i at byte i - 1; None for kinds that do not read them. BOS is
    implicit, a patch of its own, and the first entry is True. Equal to the starts of `patch_lengths` of BOS and the
    document with `include_next`; only kind `fixed` counts from byte 0 instead of from BOS. Errors as `patch_lengths`.
    """
    byte_ids_T = F.pad(vocabulary.encode(document), (1, 0), value=vocabulary.BOS)
    if entropies is not None:
        byte_ids_T = byte_ids_T.to(entropies.device)
    _check_values(byte_ids_T, entropies, rule)
    if rule.kind == "fixed":
        return patch_starts(byte_ids_T[1:], None, rule, include_next=True)
    return patch_starts(byte_ids_T, entropies, rule, include_next=True)[1:]


def quantize_entropies(entropies: Tensor) -> Tensor:
    """uint8 ceil(32 H) of entropies H in nats, any float dtype and shape: what a dataset stores. ValueError for NaN.

    A threshold that is a multiple of 1/32 decides alike before and after: H > m / 32 if and only if ceil(32 H) > m.
    """
    if bool(entropies.isnan().any()):
        raise ValueError("entropies hold NaN: it cannot be quantized")
    return _steps(entropies).to(torch.uint8)


def stored_entropies(values: bytes | Tensor) -> Tensor:
    """float32 nats of stored uint8 values, one byte each; a quantized rule cuts them as it cuts the original ones."""
    if isinstance(values, bytes):
        values = torch.frombuffer(bytearray(values), dtype=torch.uint8) if values else torch.empty(0, dtype=torch.uint8)
    return values.to(torch.float32) / ENTROPY_STEPS_PER_NAT


def starts_to_lengths(starts_BM: Tensor) -> Tensor:
    """Patch lengths int64 [B, P] of bool patch starts [B, M], zeros trailing; P = the most patches of a row.

    Entry 0 of each row is expected to be True: positions before a row's first start are not counted.
    """
    num_positions = starts_BM.shape[1]
    row_S, position_S = starts_BM.nonzero(as_tuple=True)
    counts_B = starts_BM.sum(1)
    num_patches = int(counts_B.max()) if counts_B.numel() else 0
    lengths_BP = torch.zeros(starts_BM.shape[0], num_patches, dtype=torch.int64, device=starts_BM.device)
    index_S = torch.arange(row_S.numel(), device=starts_BM.device) - (counts_B.cumsum(0) - counts_B)[row_S]
    flat_S = row_S * num_positions + position_S
    ends_S = torch.minimum(F.pad(flat_S[1:], (0, 1), value=starts_BM.numel()), (row_S + 1) * num_positions)
    lengths_BP[row_S, index_S] = ends_S - flat_S
    return lengths_BP


def _starts_after(decisions_BT: Tensor, num_positions: int) -> Tensor:
    """Bool [B, M]: positions 0 and 1 start patches, and so does i + 1 for each true decision at i >= 1."""
    starts_BM = F.pad(decisions_BT, (1, 0))[:, :num_positions]
    starts_BM[:, :2] = True
    return starts_BM


def _decisions(ids_BT: Tensor, entropies_BT: Tensor | None, rule: PatchRule) -> Tensor:
    """Bool [B, T]: whether the byte after byte i starts a patch, looked at for i >= 1."""
    if rule.kind == "space":
        return _space_ends(ids_BT)
    assert entropies_BT is not None
    if rule.quantized:
        entropies_BT = stored_entropies(_steps(entropies_BT))
    if rule.kind == "top_k":
        return _top_k_decisions(entropies_BT, rule)
    return _entropy_decisions(entropies_BT, rule)


def _steps(entropies: Tensor) -> Tensor:
    """ceil(32 H), exact in every float dtype: 32 is a power of two, and ln 260 nats are 178 steps."""
    return (entropies * ENTROPY_STEPS_PER_NAT).ceil().clamp(0, 255)


def _entropy_decisions(entropies_BT: Tensor, rule: PatchRule) -> Tensor:
    """Bool [B, T]: whether H_i satisfies the rule; compared, and differences taken, in the dtype of the entropies given
    (of a quantized rule float32, in which differences of its multiples of 1/32 are exact).

    Rules on the rise have no rise to look at for i = 1 (H_0 is not read) and let byte 2 start a patch. With
    `threshold_add` byte 3 then never starts one, which is what the published implementation computes.
    """
    threshold = entropies_BT.new_full((), rule.threshold)
    if not rule.monotonic and rule.threshold_add is None:
        return entropies_BT > threshold
    rise_BT = F.pad(entropies_BT[:, 1:] - entropies_BT[:, :-1], (1, 0))[:, : entropies_BT.shape[1]]
    if rule.monotonic:
        decisions_BT = rise_BT > threshold
    else:
        assert rule.threshold_add is not None
        decisions_BT = (rise_BT > entropies_BT.new_full((), rule.threshold_add)) & (entropies_BT > threshold)
        decisions_BT[:, 2:3] = False
    decisions_BT[:, 1:2] = True
    return decisions_BT


def _top_k_decisions(entropies_BT: Tensor, rule: PatchRule) -> Tensor:
    """Bool [B, T]: the T // patch_size - 2 highest of H_1 .. H_{T-1}; of equal ones the earlier."""
    num_bytes = entropies_BT.shape[1]
    num_chosen = max(int(num_bytes // (rule.patch_size or 1.0)) - 2, 0)
    order_BT = entropies_BT[:, 1:].sort(dim=1, descending=True, stable=True).indices + 1
    return torch.zeros_like(entropies_BT, dtype=torch.bool).scatter_(1, order_BT[:, :num_chosen], True)


def _space_ends(ids_BT: Tensor) -> Tensor:
    """Bool [B, T]: bytes that end a patch: each special id, and the first of each run of space-like bytes."""
    byte_BT = ids_BT.to(torch.int32) - vocabulary.BYTE_OFFSET
    word_BT = _between(byte_BT, ord("0"), ord("9")) | _between(byte_BT, ord("A"), ord("Z"))
    word_BT = word_BT | _between(byte_BT, ord("a"), ord("z")) | _between(byte_BT, 0x80, 0xBF)
    after_word_BT = F.pad(word_BT, (1, 0))[:, :-1]
    return (~word_BT & after_word_BT) | (byte_BT < 0)


def _between(values: Tensor, first: int, last: int) -> Tensor:
    return (values >= first) & (values <= last)


def _split_long(starts_BM: Tensor, max_patch_length: int) -> Tensor:
    """Starts with every patch longer than `max_patch_length` cut into patches of that length and a remainder."""
    position_M = torch.arange(starts_BM.shape[1], device=starts_BM.device)
    latest_start_BM = (position_M * starts_BM).cummax(dim=1).values
    return (position_M - latest_start_BM) % max_patch_length == 0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _check_shapes(byte_ids: Tensor, entropies: Tensor | None, rule: PatchRule) -> None:
    if byte_ids.ndim not in (1, 2):
        raise ValueError(f"byte_ids must have shape [T] or [B, T], got {list(byte_ids.shape)}")
    if byte_ids.dtype not in _INTEGER_DTYPES:
        raise ValueError(f"byte_ids must be integers, got {byte_ids.dtype}")
    if entropies is None:
        if rule.needs_entropies:
            raise ValueError(f"patch rule of kind {rule.kind} needs entropies, got None")
        return
    if entropies.shape != byte_ids.shape:
        raise ValueError(f"entropies must have shape {list(byte_ids.shape)} as byte_ids, got {list(entropies.shape)}")
    if not entropies.is_floating_point():
        raise ValueError(f"entropies must be floating-point nats, got {entropies.dtype}")
    if entropies.device != byte_ids.device:
        raise ValueError(f"entropies (on {entropies.device}) and byte_ids (on {byte_ids.device}) must be on one device")


def _check_values(byte_ids: Tensor, entropies: Tensor | None, rule: PatchRule) -> None:
    _check_shapes(byte_ids, entropies, rule)
    if byte_ids.numel():
        lowest, highest = (int(bound) for bound in byte_ids.aminmax())
        if lowest < 0 or highest >= vocabulary.VOCABULARY_SIZE:
            raise ValueError(f"byte_ids must lie in 0..{vocabulary.VOCABULARY_SIZE - 1}, got {lowest}..{highest}")
    if rule.needs_entropies and entropies is not None and bool(entropies[..., 1:].isnan().any()):
        raise ValueError("entropies hold NaN: no patch rule can compare it")
