"""The pure functions of a shard plan."""

import dataclasses
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blt.errors import ConfigError
from pipelines.shard.config import ShardConfig
from pipelines.shard.files import InputFile, distinct_names
from pipelines.shard.plan import balanced_cuts, make_groups, make_plan, shuffle_key, split_position


def _file(name: str, size_bytes: int = 1, sample: str = "s") -> InputFile:
    return InputFile(url=f"/corpus/{name}", name=name, size_bytes=size_bytes, sample=sample)


FILES = st.lists(st.integers(0, 100), max_size=30).map(
    lambda sizes: [_file(f"{i}.jsonl", size) for i, size in enumerate(sizes)]
)


@given(st.lists(st.integers(0, 100)), st.integers(1, 200))
def test_cuts_cover_all_rows_in_balanced_runs(sizes: list[int], cap: int) -> None:
    cuts = balanced_cuts(sizes, cap)
    assert [size for cut in cuts for size in sizes[cut]] == sizes
    assert all(cut.stop > cut.start for cut in cuts)
    num_runs = max(1, -(-sum(sizes) // cap))
    assert len(cuts) <= num_runs
    share, largest = sum(sizes) / num_runs, max(sizes, default=0)
    assert all(sum(sizes[cut]) <= share + largest for cut in cuts)


def test_cuts_of_equal_rows_are_equal() -> None:
    assert [cut.stop - cut.start for cut in balanced_cuts([10] * 12, 40)] == [4, 4, 4]
    assert [cut.stop - cut.start for cut in balanced_cuts([10] * 5, 40)] == [2, 3]
    assert balanced_cuts([], 40) == []


@given(FILES, st.integers(1, 300), st.integers(0, 3))
def test_groups_hold_every_file_once_within_the_cap_in_any_order(files: list[InputFile], cap: int, seed: int) -> None:
    groups = make_groups(files, cap, seed)
    assert sorted(f.name for group in groups for f in group.files) == sorted(f.name for f in files)
    assert [group.index for group in groups] == list(range(len(groups)))
    assert all(group.input_bytes <= cap or len(group.files) == 1 for group in groups)
    shuffled = files.copy()
    random.Random(seed).shuffle(shuffled)
    assert make_groups(shuffled, cap, seed) == groups


def test_seed_moves_files_between_groups() -> None:
    files = [_file(f"{i}.jsonl") for i in range(40)]
    assert make_groups(files, 10, 0) != make_groups(files, 10, 1)


def test_compressed_files_count_for_the_text_in_them() -> None:
    files = [_file("a.jsonl.zst", 10), _file("b.jsonl.zst", 10)]
    assert len(make_groups(files, 69, 0)) == 2
    assert len(make_groups(files, 70, 0)) == 1


def test_split_position_is_the_content_hash() -> None:
    # sha256("") = e3b0c44298fc1c14...: pinned, since a change would move documents between train and valid.
    assert split_position(b"") == 0xE3B0C44298FC1C14 / 2**64
    positions = [split_position(str(i).encode()) for i in range(4000)]
    assert abs(sum(p < 0.05 for p in positions) / 4000 - 0.05) < 0.02  # 5 standard deviations


def test_shuffle_keys_depend_on_seed_name_and_offset() -> None:
    keys = {shuffle_key(s, n, o) for s in (0, 1) for n in ("a", "b") for o in (0, 1)}
    assert len(keys) == 8


def test_plan_does_not_depend_on_where_the_corpus_lies_but_on_its_content() -> None:
    config = ShardConfig(input=("here",))
    files = [_file("a.jsonl", 5), _file("b.jsonl", 6)]
    plan = make_plan(config, files)
    moved = [dataclasses.replace(f, url=f"/elsewhere/{f.name}") for f in reversed(files)]
    assert make_plan(dataclasses.replace(config, input=("there",)), moved).to_json() == plan.to_json()
    for changed in (_file("b.jsonl", 7), _file("b.jsonl", 6, sample="t"), _file("c.jsonl", 6)):
        assert make_plan(config, [files[0], changed]).inputs != plan.inputs
    assert make_plan(dataclasses.replace(config, seed=1), files).to_json() != plan.to_json()


@given(st.sets(st.lists(st.sampled_from("ab"), min_size=1, max_size=4).map("/".join), max_size=12))
def test_names_become_distinct_and_stay_ends_of_the_url(paths: set[str]) -> None:
    names = distinct_names({f"/{path}/f.txt": "f.txt" for path in paths})
    assert len(set(names.values())) == len(paths)
    assert all(url.endswith(name) for url, name in names.items())


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"input": ()}, "input"),
        ({"input": ("",)}, "input"),
        ({"valid_fraction": 0.0}, "valid_fraction"),
        ({"valid_fraction": 1.0}, "valid_fraction"),
        ({"shard_bytes": 0}, "shard_bytes"),
        ({"min_bytes": 0}, "min_bytes"),
        ({"max_line_bytes": 2**31}, "max_line_bytes"),
        ({"text_key": "id"}, "text_key"),
        ({"source": ""}, "source"),
        ({"stall_seconds": 0}, "stall_seconds"),
    ],
)
def test_settings_out_of_range_name_their_key(change: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        ShardConfig(**({"input": ("x",)} | change))  # type: ignore[arg-type]
