"""Patch rules: golden vectors, a per-byte oracle written from the rules' definition, properties, and refused input."""

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from blt.errors import ConfigError
from blt.patching import (
    ENTROPY_STEPS_PER_NAT,
    Kind,
    PatchRule,
    document_patch_starts,
    patch_lengths,
    patch_starts,
    quantize_entropies,
    starts_to_lengths,
    stored_entropies,
)
from blt.vocabulary import BOS, EOS, encode

GOLDEN = Path(__file__).parent.parent / "golden"
VECTORS = dict(np.load(GOLDEN / "patching.npz"))
MODES = json.loads((GOLDEN / "patching_meta.json").read_text())["modes"]
KINDS = {"entropy": "entropy", "space": "space", "static": "fixed", "byte": "byte"}


def golden_rule(mode: str) -> PatchRule:
    arguments = dict(MODES[mode.removesuffix("_from_f16")])
    arguments["kind"] = KINDS[arguments.pop("patching_mode")]
    if "monotonicity" in arguments:
        arguments["monotonic"] = arguments.pop("monotonicity")
    return PatchRule(**arguments)


@pytest.mark.parametrize("case", [key for key in VECTORS if key.endswith((".next0", ".next1"))])
def test_golden(case: str) -> None:
    text, variant, mode, last = case.split(".")
    entropies = "entropies_f16" if mode.endswith("_from_f16") else "entropies"
    lengths = patch_lengths(
        torch.from_numpy(VECTORS[f"{text}.{variant}.tokens"]),
        torch.from_numpy(VECTORS[f"{text}.{variant}.{entropies}"]),
        golden_rule(mode),
        include_next=last == "next1",
    )
    assert lengths.tolist() == VECTORS[case].tolist()


def test_every_golden_case_is_read() -> None:
    assert sum(key.endswith((".next0", ".next1")) for key in VECTORS) == 231


# The oracle: one byte after the other, from the definition of the rules.


def oracle_flags(entropies: np.ndarray, rule: PatchRule, patch_size: float | None) -> list[bool]:
    """Whether e_j = H_{j+1} lets position j + 2 start a patch."""
    e = entropies[1:]
    if patch_size is not None:
        count = max(int(len(entropies) // patch_size) - 2, 0)
        chosen = sorted(range(len(e)), key=lambda j: (-e[j], j))[:count]
        return [j in chosen for j in range(len(e))]
    with np.errstate(over="ignore"):  # a threshold past the range of float16 is infinite there
        threshold = entropies.dtype.type(rule.threshold)
    flags: list[bool] = []
    for j in range(len(e)):
        if not rule.monotonic and rule.threshold_add is None:
            flags.append(bool(e[j] > threshold))
        elif j == 0:
            flags.append(True)
        elif rule.monotonic:
            flags.append(bool(e[j] - e[j - 1] > threshold))
        else:
            rises = bool(e[j] - e[j - 1] > entropies.dtype.type(rule.threshold_add))
            flags.append(rises and bool(e[j] > threshold) and j != 1)
    return flags


def is_space_like(byte_id: int) -> bool:
    u = byte_id - 4
    return (
        u < ord("0")
        or ord("9") < u < ord("A")
        or ord("Z") < u < ord("a")
        or ord("z") < u < 0x80
        or u >= 0xC0
    )  # fmt: skip


def oracle_lengths(ids: list[int], entropies: np.ndarray, rule: PatchRule, include_next: bool) -> list[int]:
    if not ids:
        return []
    if rule.quantized:
        steps = [min(max(math.ceil(float(entropy) * 32), 0), 255) for entropy in entropies]
        entropies = np.array(steps, dtype=np.float32) / np.float32(32)
    num_positions = len(ids) + include_next
    starts = {0, 1}
    if rule.kind == "byte":
        starts |= set(range(num_positions))
    elif rule.kind == "fixed":
        starts = set(range(0, num_positions, int(rule.patch_size or 0)))
    elif rule.kind == "space":
        for i in range(1, len(ids)):
            first_of_run = is_space_like(ids[i]) and not is_space_like(ids[i - 1])
            if first_of_run or ids[i] < 4:
                starts.add(i + 1)
    else:
        flags = oracle_flags(entropies, rule, rule.patch_size if rule.kind == "top_k" else None)
        starts |= {j + 2 for j, flag in enumerate(flags) if flag}
    borders = [*sorted(start for start in starts if start < num_positions), num_positions]
    lengths: list[int] = []
    for begin, end in pairwise(borders):
        remaining = end - begin
        while rule.max_patch_length is not None and remaining > rule.max_patch_length:
            lengths.append(rule.max_patch_length)
            remaining -= rule.max_patch_length
        lengths.append(remaining)
    return lengths


# Values on a coarse grid meet thresholds and one another often; the others are any entropy 260 ids can have.
GRID = st.integers(0, 24).map(lambda eighths: eighths / 8)
ENTROPY = st.one_of(GRID, st.floats(0, 5.5, width=16))
DTYPES = {torch.float64: np.float64, torch.float32: np.float32, torch.float16: np.float16}
# Mostly letters and spaces, with every special id, lead and continuation byte.
BYTE_IDS = st.one_of(st.integers(0, 259), st.sampled_from([id_ + 4 for id_ in b"aZ09 \n./:@[`{\x7f\x80\xbf\xc0\xff"]))


@st.composite
def rules(draw: st.DrawFn) -> PatchRule:
    kind: Any = draw(st.sampled_from(["entropy", "entropy", "entropy", "space", "fixed", "byte", "top_k"]))
    patch_size: float = draw(st.integers(1, 9))
    if kind == "top_k" and draw(st.booleans()):
        patch_size += 0.5
    return PatchRule(
        kind=kind,
        threshold=draw(st.one_of(GRID, st.sampled_from([-1.0, 1e9]), st.floats(-1, 5.6))),
        threshold_add=draw(st.one_of(st.none(), st.floats(-2, 2), st.sampled_from([-0.25, 0.0, 0.125]))),
        monotonic=draw(st.booleans()),
        patch_size=patch_size,
        max_patch_length=draw(st.one_of(st.none(), st.integers(1, 12))),
        quantized=draw(st.booleans()),
    )


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    num_bytes = draw(st.one_of(st.integers(0, 5), st.integers(6, 80)))
    num_rows = draw(st.integers(1, 3))
    row = st.lists(BYTE_IDS, min_size=num_bytes, max_size=num_bytes)
    equal = ENTROPY.map(lambda value: [value] * num_bytes)
    nats = st.one_of(st.lists(ENTROPY, min_size=num_bytes, max_size=num_bytes), equal)
    ids = torch.tensor([draw(row) for _ in range(num_rows)], dtype=torch.int64)
    entropies = torch.tensor([draw(nats) for _ in range(num_rows)], dtype=draw(st.sampled_from(list(DTYPES))))
    return ids, entropies


@settings(max_examples=400, deadline=None)
@given(batches(), rules(), st.booleans())
def test_equals_oracle_and_keeps_its_invariants(
    batch: tuple[Tensor, Tensor], rule: PatchRule, include_next: bool
) -> None:
    ids_BT, entropies_BT = batch
    lengths_BP = patch_lengths(ids_BT, entropies_BT, rule, include_next)
    assert lengths_BP.dtype == torch.int64
    rows = []
    for ids_T, entropies_T, lengths_P in zip(ids_BT, entropies_BT, lengths_BP.tolist(), strict=True):
        expected = oracle_lengths(ids_T.tolist(), entropies_T.numpy(), rule, include_next)
        rows.append(expected)
        assert lengths_P == expected + [0] * (len(lengths_P) - len(expected))
        assert patch_lengths(ids_T, entropies_T, rule, include_next).tolist() == expected
        assert all(length > 0 for length in expected)
        assert rule.max_patch_length is None or max(expected, default=0) <= rule.max_patch_length
        assert sum(lengths_P) == (len(ids_T) + include_next if len(ids_T) else 0)
    assert lengths_BP.shape[1] == max(len(row) for row in rows)


@settings(max_examples=200, deadline=None)
@given(batches(), rules())
def test_the_virtual_byte_only_adds_to_the_end(batch: tuple[Tensor, Tensor], rule: PatchRule) -> None:
    ids_BT, entropies_BT = batch
    without = patch_starts(ids_BT, entropies_BT, rule)
    assert torch.equal(patch_starts(ids_BT, entropies_BT, rule, include_next=True)[:, : without.shape[1]], without)


@settings(max_examples=200, deadline=None)
@given(batches(), rules())
def test_h0_is_never_read(batch: tuple[Tensor, Tensor], rule: PatchRule) -> None:
    ids_BT, entropies_BT = batch
    expected = patch_lengths(ids_BT, entropies_BT, rule, include_next=True)
    changed_BT = entropies_BT.clone()
    changed_BT[:, :1] = torch.nan
    assert torch.equal(patch_lengths(ids_BT, changed_BT, rule, include_next=True), expected)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60), st.data(), rules())
def test_document_starts_are_those_of_a_row_after_bos(document: bytes, data: st.DataObject, rule: PatchRule) -> None:
    size = len(document) + 1
    entropies = torch.tensor(data.draw(st.lists(ENTROPY, min_size=size, max_size=size)), dtype=torch.float32)
    starts = document_patch_starts(document, entropies, rule)
    assert starts.dtype == torch.bool
    assert starts.shape == (size,)
    assert starts[0]
    lengths = starts_to_lengths(starts[None])[0]
    if rule.kind == "fixed":
        assert not document or torch.equal(lengths, patch_lengths(encode(document), None, rule, include_next=True))
        return
    byte_ids = torch.cat([torch.tensor([BOS]), encode(document)])
    expected = patch_lengths(byte_ids, entropies, rule, include_next=True)
    assert expected[0] == 1
    assert torch.equal(lengths, expected[1:])


# Entropies at, next to and between the steps that are stored, up to the most that 260 ids can have.
STEPS = st.integers(0, 178)
NEAR_A_STEP = st.builds(
    lambda step, toward: float(np.nextafter(np.float32(step / 32), np.float32(toward))),
    STEPS,
    st.sampled_from([0.0, 10.0]),
)
NATS_NEAR_STEPS = st.one_of(STEPS.map(lambda step: step / 32), NEAR_A_STEP, st.floats(0, 5.5, width=32))


@settings(max_examples=150, deadline=None)
@given(st.lists(NATS_NEAR_STEPS, min_size=3, max_size=60), st.integers(0, 178))
def test_a_plain_threshold_on_a_step_decides_as_without_quantization(nats: list[float], step: int) -> None:
    document, entropies = b"x" * (len(nats) - 1), torch.tensor(nats)
    plain = PatchRule(threshold=step / ENTROPY_STEPS_PER_NAT)
    expected = document_patch_starts(document, entropies, plain)
    assert torch.equal(document_patch_starts(document, entropies, replace(plain, quantized=True)), expected)


STORED_RULES = [
    PatchRule(threshold=1.4, quantized=True),
    PatchRule(threshold=0.1, monotonic=True, quantized=True),
    PatchRule(threshold=0.0, monotonic=True, quantized=True, max_patch_length=3),
    PatchRule(threshold=1.0, threshold_add=0.03125, quantized=True),
    PatchRule(kind="top_k", patch_size=3.5, quantized=True),
]


@settings(max_examples=150, deadline=None)
@given(st.lists(NATS_NEAR_STEPS, min_size=1, max_size=60), st.sampled_from(STORED_RULES), st.sampled_from([*DTYPES]))
def test_stored_entropies_give_the_patches_of_the_original_ones(
    nats: list[float], rule: PatchRule, dtype: torch.dtype
) -> None:
    document, entropies = b"x" * (len(nats) - 1), torch.tensor(nats, dtype=dtype)
    stored = quantize_entropies(entropies)
    assert stored.tolist() == [math.ceil(32 * value) for value in entropies.tolist()]
    assert (stored.dtype, stored_entropies(stored).dtype) == (torch.uint8, torch.float32)
    again = stored_entropies(bytes(stored.tolist()))
    assert torch.equal(again, stored_entropies(stored))
    assert torch.equal(quantize_entropies(again), stored)
    expected = document_patch_starts(document, entropies, rule)
    assert torch.equal(document_patch_starts(document, again, rule), expected)


def test_quantization_changes_which_rises_pass() -> None:
    entropies = torch.tensor([0.5, 0.5, 0.51, 0.52, 0.535])
    rule = PatchRule(threshold=0.012, monotonic=True)
    assert document_patch_starts(b"xxxx", entropies, rule).tolist() == [True, True, False, False, True]
    quantized = replace(rule, quantized=True)
    assert document_patch_starts(b"xxxx", entropies, quantized).tolist() == [True, True, True, False, True]


def test_entropies_that_cannot_be_stored() -> None:
    with pytest.raises(ValueError, match="NaN"):
        quantize_entropies(torch.tensor([1.0, torch.nan]))
    with pytest.raises(ValueError, match="NaN"):
        document_patch_starts(b"xx", torch.tensor([1.0, 1.0, torch.nan]), PatchRule(quantized=True))
    assert quantize_entropies(torch.tensor([-1e-7, 0.0])).tolist() == [0, 0]
    assert stored_entropies(b"").shape == (0,)


EDGE_DOCUMENTS = [b"", b"x", b"\x80", b"\xff\xfe\x80\xc0", b" " * 20, b"a" * 600, "naïve café, 北京\n".encode()]


@pytest.mark.parametrize("document", EDGE_DOCUMENTS, ids=lambda document: repr(document[:6]))
@pytest.mark.parametrize("kind", ["entropy", "space", "fixed", "byte", "top_k"])
@pytest.mark.parametrize("level", [-1.0, 1.0, 9.0])
def test_edge_documents(document: bytes, kind: Any, level: float) -> None:
    """All entropies equal, and below, at and above the threshold: no boundary, none (strict), all."""
    rule = PatchRule(kind=kind, threshold=1.0, patch_size=4, max_patch_length=512)
    byte_ids = torch.cat([torch.tensor([BOS]), encode(document), torch.tensor([EOS])])
    entropies = torch.full(byte_ids.shape, level)
    for include_next in (False, True):
        lengths = patch_lengths(byte_ids, entropies, rule, include_next)
        assert lengths.tolist() == oracle_lengths(byte_ids.tolist(), entropies.numpy(), rule, include_next)
        assert lengths.sum() == len(byte_ids) + include_next
        assert lengths.max() <= 512
    if kind == "entropy" and level == 9.0:
        assert lengths.tolist() == [1] * (len(document) + 3)
    if kind == "entropy" and level <= 1.0 and len(document) < 500:
        assert lengths.tolist() == [1, len(document) + 2]


def test_comparison_is_made_in_the_dtype_of_the_entropies() -> None:
    """0.1 in float32 lies above 0.1 in float64; as a float32 threshold it is the same number, and not passed."""
    ids = torch.tensor([BOS, 10, 10, 10])
    at_threshold = torch.full((4,), 0.1)
    rule = PatchRule(threshold=0.1)
    assert patch_lengths(ids, at_threshold, rule).tolist() == [1, 3]
    assert patch_lengths(ids, at_threshold.double(), rule).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("num_rows", [0, 1, 3])
@pytest.mark.parametrize("include_next", [False, True])
@pytest.mark.parametrize("kind", ["entropy", "space", "fixed", "byte", "top_k"])
def test_no_bytes_give_no_patches(num_rows: int, include_next: bool, kind: Any) -> None:
    rule = PatchRule(kind=kind, patch_size=2, max_patch_length=3)
    ids_BT = torch.zeros(num_rows, 0, dtype=torch.int64)
    assert patch_lengths(ids_BT, torch.zeros(num_rows, 0), rule, include_next).shape == (num_rows, 0)
    assert patch_lengths(ids_BT.flatten(), torch.zeros(0), rule, include_next).shape == (0,)


class LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers the most elements any operation returned."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.num_elements = max(self.num_elements, tensor.numel())
        return result


@pytest.mark.parametrize(
    "rule",
    [
        PatchRule(threshold=0.7),
        PatchRule(threshold=0.1, monotonic=True),
        PatchRule(threshold=0.5, threshold_add=0.1),
        PatchRule(kind="space"),
        PatchRule(kind="fixed", patch_size=4),
        PatchRule(kind="byte"),
        PatchRule(kind="top_k", patch_size=4.5),
        PatchRule(threshold=0.1, monotonic=True, quantized=True),
    ],
    ids=lambda rule: rule.kind,
)
def test_memory_grows_with_bytes_alone(rule: PatchRule) -> None:
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(0, 260, (2, 4000), generator=generator)
    with LargestTensor() as largest:
        patch_lengths(ids_BT, torch.rand(2, 4000, generator=generator), rule, include_next=True)
    assert largest.num_elements <= 2 * (ids_BT.numel() + 2)  # two indices for each start


IDS = torch.tensor([[1, 10, 11, 2]])
NATS = torch.ones(1, 4)


@pytest.mark.parametrize(
    ("ids", "entropies", "kind", "message"),
    [
        (IDS, None, "entropy", "needs entropies"),
        (IDS, None, "top_k", "needs entropies"),
        (IDS, NATS[:, :3], "entropy", r"shape \[1, 4\]"),
        (IDS, NATS[0], "entropy", r"shape \[1, 4\]"),
        (IDS, NATS.long(), "entropy", "floating-point"),
        (IDS.float(), NATS, "entropy", "must be integers"),
        (IDS.bool(), NATS, "entropy", "must be integers"),
        (IDS[None], NATS[None], "entropy", r"\[T\] or \[B, T\]"),
        (torch.tensor([[1, 10, 260, 2]]), NATS, "space", r"0\.\.259"),
        (torch.tensor([[1, 10, 11, -1]]), NATS, "space", r"0\.\.259"),
        (IDS, torch.tensor([[1, 1, torch.nan, 1]]), "entropy", "NaN"),
        (IDS, torch.tensor([[1, 1, torch.nan, 1]]), "top_k", "NaN"),
    ],
)
def test_refused_inputs(ids: Tensor, entropies: Tensor | None, kind: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        patch_lengths(ids, entropies, PatchRule(kind=kind, patch_size=2))


def test_document_entropies_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \[4\]"):
        document_patch_starts(b"abc", torch.ones(3), PatchRule())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "static"}, "entropy, space, fixed, byte, top_k"),
        ({"kind": "fixed"}, "needs patch_size"),
        ({"kind": "top_k"}, "needs patch_size"),
        ({"kind": "fixed", "patch_size": 4.5}, "whole number"),
        ({"kind": "fixed", "patch_size": 0}, "at least 1"),
        ({"kind": "top_k", "patch_size": float("inf")}, "finite"),
        ({"threshold": float("nan")}, "threshold"),
        ({"threshold": None}, "threshold"),
        ({"threshold_add": "1"}, "threshold_add"),
        ({"max_patch_length": 0}, "max_patch_length"),
        ({"max_patch_length": 2.0}, "max_patch_length"),
    ],
)
def test_refused_rules(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PatchRule(**arguments)


def test_rules_that_need_entropies() -> None:
    rules = [PatchRule(kind=kind, patch_size=2) for kind in get_args(Kind)]
    assert {rule.kind for rule in rules if rule.needs_entropies} == {"entropy", "top_k"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@settings(max_examples=50, deadline=None)
@given(batches(), rules(), st.booleans())
def test_cuda_equals_cpu(batch: tuple[Tensor, Tensor], rule: PatchRule, include_next: bool) -> None:
    ids_BT, entropies_BT = batch
    on_cuda = patch_lengths(ids_BT.cuda(), entropies_BT.cuda(), rule, include_next)
    assert torch.equal(on_cuda.cpu(), patch_lengths(ids_BT, entropies_BT, rule, include_next))
