"""`blt bench entropy|train|generate` at a tiny size: every figure is there, and the peer gives the same results."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from blt.entropy_model import EntropyModel, EntropyModelConfig
from blt.errors import ConfigError
from blt.model import BLT
from jobs.bench import entropy, generate, train
from jobs.bench.subject import RowShape, drawn_patch_lengths, small_blt, small_entropy_model
from jobs.bench.turns import take_turns
from tests.model_cases import blt_config, transformer_config


@pytest.fixture(autouse=True)
def _threads_stay() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def tiny_entropy_model() -> EntropyModelConfig:
    return EntropyModelConfig(transformer=transformer_config(width=16, layers=1, heads=2, window=8))


def assert_speeds(figures: Mapping[str, Any]) -> None:
    assert figures["bytes_per_second"]["median"] > 0
    assert figures["share_of_peak"]["median"] > 0
    assert figures["peak_memory_bytes"] > 10**7


def test_entropy_passes() -> None:
    config = entropy.Config(
        model=tiny_entropy_model(), shortest_bytes=20, longest_bytes=60, bytes=300, repeats=2, threads=1
    )
    figures = entropy.run(config).figures
    assert_speeds(figures)
    assert 300 <= figures["measured_bytes"] < 360
    assert len(figures["bytes_per_second"]["repeats"]) == 2
    assert "ratio" not in figures


def test_entropy_passes_against_the_peer() -> None:
    config = entropy.Config(
        model=tiny_entropy_model(), shortest_bytes=40, longest_bytes=40, bytes=80, repeats=1, threads=1,
        against="transformers",
    )  # fmt: skip
    figures = entropy.run(config).figures
    assert_speeds(figures["transformers"])
    assert figures["ratio"]["median"] > 0
    assert figures["largest_difference_nats"] < 3e-5


def test_training_steps_against_the_peer() -> None:
    config = train.Config(
        model=blt_config(),
        shapes=(RowShape(bytes=40, rows=2), RowShape(bytes=64)),
        repeats=1,
        threads=1,
        against="transformers",
        against_bytes=40,
    )
    shapes = train.run(config).figures["shapes"]
    assert list(shapes) == ["40x2", "64x1"]
    for figures in shapes.values():
        assert_speeds(figures)
    assert shapes["40x2"]["loss_difference"] < 3e-5
    assert "transformers" not in shapes["64x1"], "its rows are longer than the peer is given"


def test_generation_against_the_peer() -> None:
    config = generate.Config(
        model=blt_config(),
        entropy_model=tiny_entropy_model(),
        contexts=(16, 40),
        new_bytes=6,
        batch=3,
        repeats=1,
        threads=1,
        against="transformers",
        against_new_bytes=2,
        against_context=16,
    )
    figures = generate.run(config).figures
    assert set(figures["contexts"]) == {"16", "40"}
    assert figures["contexts"]["16"]["ratio"]["median"] > 0
    assert "ratio" not in figures["contexts"]["40"]
    assert figures["contexts"]["40"]["speculative"]["equal"]
    assert all(0 <= of["share_of_peak"]["median"] < 1 < of["peak_memory_bytes"] for of in figures["contexts"].values())
    assert figures["batch"]["equal_to_single_runs"]
    assert figures["cost_of_a_byte_longest_to_shortest"] > 0


def test_continuations_agree_up_to_a_tie() -> None:
    assert generate._agreement([1, 2, 3], [1, 2, 3], [1.0, 1.0, 1.0]) == (True, False)
    assert generate._agreement([1, 2, 3], [1, 9, 9], [1.0, 1.0, 1.0]) == (False, False)
    assert generate._agreement([1, 2, 3], [1, 9, 9], [1.0, 1e-5, 1.0]) == (True, True)


@pytest.mark.parametrize("shape", [RowShape(bytes=1), RowShape(bytes=50, rows=4), RowShape(bytes=2000, rows=2)])
def test_drawn_patches_fill_their_rows(shape: RowShape) -> None:
    lengths = drawn_patch_lengths(shape, torch.Generator().manual_seed(1))
    assert lengths.sum(1).tolist() == [shape.bytes + 1] * shape.rows
    assert lengths[:, 0].tolist() == [1] * shape.rows
    assert int(lengths.max()) <= 7
    zeros = (lengths == 0).int()
    assert torch.equal(zeros.sort(1).values, zeros), "zeros are trailing"
    if shape.bytes > 1000:
        assert 3.8 < (lengths.sum() / (lengths > 0).sum()) < 4.2


def test_subjects_take_turns() -> None:
    calls: list[str] = []
    subjects = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    turns = take_turns(subjects, 2, torch.device("cpu"), torch.float32)
    assert calls == ["a", "b", "a", "b", "a", "b"], "once to warm up, then in turns"
    assert {name: len(of) for name, of in turns.items()} == {"a": 2, "b": 2}


def test_memory_is_counted_for_each_run() -> None:
    def large() -> None:
        torch.ones(40_000_000)

    turns = take_turns({"large": large, "small": lambda: None}, 1, torch.device("cpu"), torch.float32)
    assert turns["large"][0].peak_memory_bytes > turns["small"][0].peak_memory_bytes + 100_000_000


def test_default_shapes_are_those_of_published_figures() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in BLT(small_blt()).parameters()) == 23_799_040
        assert sum(p.numel() for p in EntropyModel(small_entropy_model()).parameters()) == 5_248_256


def test_settings_that_measure_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="longest_bytes 5 is below shortest_bytes 6"):
        entropy.Config(shortest_bytes=6, longest_bytes=5)
    with pytest.raises(ConfigError, match="new_bytes must be at least 2, got 1"):
        generate.Config(new_bytes=1)
    with pytest.raises(ConfigError, match="bytes and rows must be at least 1, got 0 and 1"):
        RowShape(bytes=0)
    with pytest.raises(ConfigError, match="shapes must name"):
        train.Config(shapes=())
