"""Hash n-gram ids and their embedding: golden vectors, an oracle in Python integers, document borders, gradients."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from blt.errors import ConfigError
from blt.hash_embedding import PRIMES, HashEmbedding, hash_ids, rolling_hashes

VECTORS = dict(np.load(Path(__file__).parent.parent / "golden" / "hash.npz"))


@pytest.mark.parametrize("case", [key for key in VECTORS if not key.endswith(".tokens")])
def test_golden(case: str) -> None:
    stream, size, function, table = case.split(".")
    byte_ids_BT = torch.from_numpy(VECTORS[f"{stream}.tokens"]).long()
    ids_BT = hash_ids(byte_ids_BT, int(size[1:]), int(function[1:]), int(table[1:]))
    assert ids_BT.dtype == torch.int64
    assert torch.equal(ids_BT, torch.from_numpy(VECTORS[case]).long())


def test_every_golden_case_is_read() -> None:
    assert sum(not key.endswith(".tokens") for key in VECTORS) == 140


def oracle_hash(window: list[int], function: int) -> int:
    """Signed 64-bit sum_j w_j p^j, oldest id first, in unbounded integers that wrap at the end."""
    total = 0
    for byte_id in reversed(window):
        total = total * PRIMES[function] + byte_id
    return (total + 2**63) % 2**64 - 2**63


def oracle_ids(byte_ids: list[int], positions: list[int], size: int, function: int, table_size: int) -> list[int]:
    ids = []
    for i, position in enumerate(positions):
        window = [byte_ids[i - back] if back <= position else 0 for back in reversed(range(size))]
        ids.append(oracle_hash(window, function) % table_size)
    return ids


ROWS = st.lists(st.lists(st.integers(0, 259), min_size=30, max_size=30), min_size=1, max_size=3)


@settings(max_examples=200, deadline=None)
@given(ROWS, st.integers(0, 30), st.integers(1, 12), st.integers(0, 10), st.integers(1, 2**40))
def test_equals_oracle(rows: list[list[int]], num_bytes: int, size: int, function: int, table_size: int) -> None:
    byte_ids_BT = torch.tensor(rows)[:, :num_bytes]
    ids_BT = hash_ids(byte_ids_BT, size, function, table_size)
    assert ids_BT.shape == byte_ids_BT.shape
    for byte_ids, ids in zip(byte_ids_BT.tolist(), ids_BT.tolist(), strict=True):
        assert ids == oracle_ids(byte_ids, list(range(num_bytes)), size, function, table_size)


def packed_row(seed: int) -> tuple[Tensor, Tensor]:
    """Byte ids [1, 40] of documents of 1 to 20 bytes and each byte's index inside its document."""
    byte_ids_BT = torch.randint(0, 260, (1, 40), generator=torch.Generator().manual_seed(seed))
    positions_T = torch.cat([torch.arange(length) for length in (1, 2, 9, 1, 20, 7)])
    return byte_ids_BT, positions_T[None]


@pytest.mark.parametrize("function", range(len(PRIMES)))
def test_positions_restart_the_windows(function: int) -> None:
    byte_ids_BT, positions_BT = packed_row(function)
    sizes = (3, 8, 4)
    hashes_BTG = rolling_hashes(byte_ids_BT, positions_BT, sizes, function)
    for index, size in enumerate(sizes):
        expected = oracle_ids(byte_ids_BT[0].tolist(), positions_BT[0].tolist(), size, function, 997)
        assert (hashes_BTG[0, :, index] % 997).tolist() == expected


def embedding(functions: int = 2, table_size: int = 53) -> HashEmbedding:
    torch.manual_seed(0)
    sizes = (3, 4, 7)
    return HashEmbedding(group_sizes=sizes, functions=functions, table_size=table_size, width=6, dtype=torch.float64)


@pytest.mark.parametrize("restart", [False, True])
def test_embedding_sums_one_row_of_each_table(restart: bool) -> None:
    module = embedding()
    byte_ids_BT, positions_BT = packed_row(1)
    embedded_BTD = module(byte_ids_BT, positions_BT if restart else None)
    positions = positions_BT[0].tolist() if restart else list(range(40))
    tables = module.table.view(2, 3, 53, 6)
    expected_TD = torch.zeros(40, 6, dtype=torch.float64)
    for function in range(2):
        for index, size in enumerate((3, 4, 7)):
            rows = oracle_ids(byte_ids_BT[0].tolist(), positions, size, function, 53)
            expected_TD += tables[function, index, rows]
    torch.testing.assert_close(embedded_BTD[0], expected_TD, rtol=0, atol=1e-14)


def test_embedding_of_packed_documents_is_that_of_each_alone() -> None:
    module = embedding()
    byte_ids_BT, positions_BT = packed_row(2)
    packed_TD = module(byte_ids_BT, positions_BT)[0]
    borders = [*(positions_BT[0] == 0).nonzero()[:, 0].tolist(), 40]
    alone = [module(byte_ids_BT[:, begin:end])[0] for begin, end in pairwise(borders)]
    torch.testing.assert_close(packed_TD, torch.cat(alone), rtol=0, atol=0)


def test_embedding_gradients() -> None:
    module = embedding(table_size=7, functions=1)
    byte_ids_BT, positions_BT = packed_row(3)
    weights_BTD = torch.randn(1, 40, 6, dtype=torch.float64)
    (module(byte_ids_BT, positions_BT) * weights_BTD).sum().backward()
    expected = torch.zeros_like(module.table)
    for position, rows in enumerate(module.table_rows(byte_ids_BT, positions_BT)[0].tolist()):
        for row in rows:
            expected[row] += weights_BTD[0, position]
    assert module.table.grad is not None
    torch.testing.assert_close(module.table.grad, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (1, 1)])
def test_embedding_of_empty_and_single_rows(shape: tuple[int, int]) -> None:
    assert embedding()(torch.zeros(shape, dtype=torch.int64)).shape == (*shape, 6)


def test_initialisation_is_a_normal_cut_at_three_deviations() -> None:
    torch.manual_seed(0)
    module = HashEmbedding(group_sizes=(3,), functions=1, table_size=4000, width=64)
    std = 64**-0.5
    assert module.table.abs().max() <= 3 * std
    assert module.table.abs().max() > 2.9 * std
    assert module.table.std().item() == pytest.approx(0.9866 * std, rel=0.01)  # of a normal cut at 3: 0.98658
    assert abs(module.table.mean().item()) < 0.001


@pytest.mark.parametrize(
    ("byte_ids", "size", "function", "table_size", "message"),
    [
        (torch.zeros(4, dtype=torch.int64), 3, 0, 10, r"\[B, T\]"),
        (torch.zeros(1, 4), 3, 0, 10, "integers"),
        (torch.zeros(1, 4, dtype=torch.int64), 0, 0, 10, "sizes"),
        (torch.zeros(1, 4, dtype=torch.int64), 3, 11, 10, r"0\.\.10"),
        (torch.zeros(1, 4, dtype=torch.int64), 3, -1, 10, r"0\.\.10"),
        (torch.zeros(1, 4, dtype=torch.int64), 3, 0, 0, "table_size"),
    ],
)
def test_refused_arguments(byte_ids: Tensor, size: int, function: int, table_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hash_ids(byte_ids, size, function, table_size)


def test_tables_that_cannot_be_are_refused() -> None:
    for group_sizes, functions, table_size in [((), 1, 5), ((0, 3), 1, 5), ((3,), 0, 5), ((3,), 12, 5), ((3,), 1, 0)]:
        with pytest.raises(ConfigError):
            HashEmbedding(group_sizes=group_sizes, functions=functions, table_size=table_size, width=4)
