"""The pure functions of a shard plan."""

import dataclasses
import hashlib
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blt.errors import ConfigError
from pipelines.shard.config import ShardConfig, SourceConfig
from pipelines.shard.files import FORMATS, InputFile, distinct_names
from pipelines.shard.plan import Group, balanced_cuts, make_groups, make_plan, make_units, shuffle_key, split_position


def _file(name: str, size_bytes: int = 1, sample: str = "s") -> InputFile:
    format_, compression = FORMATS["." + name.partition(".")[2]]
    return InputFile(
        url=f"/corpus/{name}",
        name=name,
        format=format_,
        compression=compression,
        size_bytes=size_bytes,
        sample=sample,
    )


def _groups(files: list[InputFile], group_bytes: int, seed: int) -> tuple[Group, ...]:
    return make_groups("c", sorted(files, key=lambda file: file.name), 0, 0, group_bytes, seed)


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
def test_groups_hold_every_byte_once_within_the_cap(files: list[InputFile], cap: int, seed: int) -> None:
    groups = _groups(files, cap, seed)
    assert [group.index for group in groups] == list(range(len(groups)))
    for group in groups:
        assert group.input_bytes <= cap
        assert list(group.units) == sorted(group.units, key=lambda unit: (unit.rank, unit.start))
    units = sorted((u for group in groups for u in group.units), key=lambda unit: (unit.rank, unit.start))
    assert {unit.file.name for unit in units} == {file.name for file in files}
    for file in files:
        ranges = [(unit.start, unit.end) for unit in units if unit.file == file]
        assert ranges[0][0] == 0
        assert ranges[-1][1] is None
        assert all(end == start for (_, end), (start, _) in itertools.pairwise(ranges))
    assert sum(unit.input_bytes for unit in units) == sum(file.size_bytes for file in files)


def test_only_what_can_be_read_from_the_middle_is_split() -> None:
    ranges = [(unit.start, unit.end) for unit in make_units(_file("a.jsonl", 100), 0, 40)]
    assert ranges == [(0, 33), (33, 66), (66, None)]
    assert len(make_units(_file("a.parquet", 40), 0, 50)) == 2
    for name in ("a.jsonl.zst", "a.jsonl.gz", "a.txt"):
        assert len(make_units(_file(name, 100), 0, 10)) == 1


def test_seed_moves_files_between_groups() -> None:
    files = [_file(f"{i}.jsonl") for i in range(40)]
    assert _groups(files, 10, 0) != _groups(files, 10, 1)


def test_compressed_files_count_for_the_text_in_them() -> None:
    files = [_file("a.jsonl.zst", 10), _file("b.jsonl.zst", 10)]
    assert len(_groups(files, 69, 0)) == 2
    assert len(_groups(files, 70, 0)) == 1


def test_a_group_is_of_one_source_and_ranks_follow_source_and_name() -> None:
    files = {"z": [_file("a.txt")], "b": [_file("b.txt"), _file("a.txt")]}
    sources = tuple(SourceConfig(name=name, input=("x",)) for name in files)
    plan = make_plan(ShardConfig(sources=sources), files)
    assert [(group.index, group.source) for group in plan.groups] == [(0, "b"), (1, "z")]
    units = [(group.source, unit.file.name, unit.rank) for group in plan.groups for unit in group.units]
    assert units == [("b", "a.txt", 0), ("b", "b.txt", 1), ("z", "a.txt", 2)]
    reordered = ShardConfig(sources=sources[::-1])
    assert make_plan(reordered, dict(reversed(files.items()))) == plan


def test_split_position_is_the_content_hash() -> None:
    # sha256("") = e3b0c44298fc1c14...: pinned, since a change would move documents between train and valid.
    digests = [hashlib.sha256(text).digest() for text in (b"", *(str(i).encode() for i in range(4000)))]
    assert split_position(digests[0]) == 0xE3B0C44298FC1C14 / 2**64
    positions = [split_position(digest) for digest in digests[1:]]
    assert abs(sum(p < 0.05 for p in positions) / 4000 - 0.05) < 0.02  # 5 standard deviations


def test_shuffle_keys_depend_on_seed_source_name_and_offset() -> None:
    keys = {shuffle_key(s, c, n, o) for s in (0, 1) for c in ("a", "b") for n in ("a", "b") for o in (0, 1)}
    assert len(keys) == 16


def test_plan_does_not_depend_on_where_the_corpus_lies_but_on_its_content() -> None:
    config = ShardConfig(input=("here",))
    files = [_file("a.jsonl", 5), _file("b.jsonl", 6)]
    plan = make_plan(config, {"corpus": files})
    moved = [dataclasses.replace(f, url=f"/elsewhere/{f.name}") for f in reversed(files)]
    assert make_plan(dataclasses.replace(config, input=("there",)), {"corpus": moved}).to_json() == plan.to_json()
    for changed in (_file("b.jsonl", 7), _file("b.jsonl", 6, sample="t"), _file("c.jsonl", 6)):
        assert make_plan(config, {"corpus": [files[0], changed]}).inputs != plan.inputs
    for change in ({"seed": 1}, {"dedup": True}, {"max_bytes": 9}, {"invalid_utf8": "keep"}):
        assert make_plan(dataclasses.replace(config, **change), {"corpus": files}).to_json() != plan.to_json()  # type: ignore[arg-type]


def test_one_source_may_be_given_in_either_form() -> None:
    short = ShardConfig(input=("x",), source="a", text_key="t", invalid_utf8="keep")
    long = ShardConfig(sources=(SourceConfig(name="a", input=("x",), text_key="t", invalid_utf8="keep"),))
    assert short.all_sources == long.all_sources
    files = {"a": [_file("a.jsonl")]}
    assert make_plan(short, files) == make_plan(long, files)


@given(st.sets(st.lists(st.sampled_from("ab"), min_size=1, max_size=4).map("/".join), max_size=12))
def test_names_become_distinct_and_stay_ends_of_the_url(paths: set[str]) -> None:
    names = distinct_names({f"/{path}/f.txt": "f.txt" for path in paths})
    assert len(set(names.values())) == len(paths)
    assert all(url.endswith(name) for url, name in names.items())


A = SourceConfig(name="a", input=("x",))


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
        ({"source": "a\n"}, "source"),
        ({"format": "csv"}, "format"),
        ({"invalid_utf8": "drop"}, "invalid_utf8"),
        ({"max_bytes": 0}, "max_bytes"),
        ({"input": (), "sources": ()}, "input"),
        ({"sources": (A,)}, "input does not go with sources"),
        ({"input": (), "text_key": "t", "sources": (A,)}, "text_key does not go with sources"),
        ({"input": (), "sources": (A, A)}, "sources must have distinct names, 'a'"),
        ({"stall_seconds": 0}, "stall_seconds"),
    ],
)
def test_settings_out_of_range_name_their_key(change: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        ShardConfig(**({"input": ("x",)} | change))  # type: ignore[arg-type]
