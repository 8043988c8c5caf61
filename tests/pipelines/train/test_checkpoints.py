"""Checkpoints of one process: what is saved comes back, what is broken is told and passed over, what fails leaves what
was there before. Several processes are in test_checkpoints_of_ranks.py, kills and storage that fails in
test_checkpoints_faults.py.
"""

import json
import logging
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load

from blt.errors import CheckpointError
from pipelines.storage import Storage
from pipelines.train import checkpoint_files
from pipelines.train.checkpoint_directory import CheckpointDirectory
from pipelines.train.checkpoint_record import RECORD_NAME, decode_record
from pipelines.train.checkpoints import Checkpoints, Loaded, Saved
from tests.pipelines.train.checkpoint_cases import RUN, assert_equal, directory, files, flip, saved, tensors, zeros


def model_file(root: Path, step: int) -> Path:
    return next(directory(root, step).glob("model-*.safetensors"))


def test_what_is_saved_is_what_is_loaded_in_place(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 100)
    found = zeros(tensors(0))
    storages = {name: tensor.data_ptr() for name, tensor in found.items()}
    assert checkpoints.load_newest(found) == Loaded(100, {"steps_done": 100}, [])
    assert_equal(found, tensors(100))
    assert {name: tensor.data_ptr() for name, tensor in found.items()} == storages
    assert checkpoints.steps() == [100]


def test_nothing_there(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path), RUN, 2)
    assert checkpoints.steps() == []
    assert checkpoints.load_newest(tensors(0)) is None


def test_a_tensor_that_is_not_contiguous(tmp_path: Path) -> None:
    whole = torch.arange(30.0).view(5, 6)
    checkpoints = Checkpoints(str(tmp_path), RUN, 2)
    checkpoints.save(1, {"model.w": whole.T}, {}, wait=True)
    checkpoints.save(2, {"model.w": whole[:, 1:4]}, {}, wait=False)
    checkpoints.wait()
    for step, expected in ((1, whole.T), (2, whole[:, 1:4])):
        column_major = torch.zeros(*reversed(expected.shape)).T
        checkpoints.load_model(step, {"w": column_major})
        assert torch.equal(column_major, expected)


def test_the_record_says_what_there_is(tmp_path: Path) -> None:
    saved(tmp_path, 100)
    record = decode_record((directory(tmp_path, 100) / RECORD_NAME).read_bytes())
    assert (record.step, record.run, record.world_size, record.state) == (100, RUN, 1, {"steps_done": 100})
    assert {name: tensor.shape for name, tensor in record.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors(100).items()
    }
    sizes = {path.name: path.stat().st_size for path in directory(tmp_path, 100).glob("*.safetensors")}
    assert {name: file.bytes for name, file in record.files.items()} == sizes
    assert {name.partition("-")[0] for name in sizes} == {"model", "exp_avg", "exp_avg_sq", "step"}


def test_other_tools_read_the_files(tmp_path: Path) -> None:
    """Torch's own reader of distributed safetensors, without the record."""
    saved(tmp_path, 100)
    found = zeros(tensors(0))
    load(found, storage_reader=HuggingFaceStorageReader(str(directory(tmp_path, 100))), no_dist=True)
    assert_equal(found, tensors(100))


def test_a_save_in_the_background_holds_the_moment_of_the_call(tmp_path: Path) -> None:
    told: list[Saved] = []
    checkpoints = Checkpoints(str(tmp_path), RUN, 9, on_saved=told.append)
    changing = tensors(0, scale=1000)
    for step in (1, 2, 3):
        for name, tensor in tensors(step, scale=1000).items():
            changing[name].copy_(tensor)
        checkpoints.save(step, changing, {"steps_done": step}, wait=False)
        for tensor in changing.values():
            tensor.fill_(1)
    checkpoints.wait()
    assert [one.step for one in told] == [1, 2, 3]
    assert all(0 < one.blocked_seconds <= one.seconds for one in told)
    for step in (3, 2, 1):
        found = zeros(changing)
        assert checkpoints.load_newest(found) == Loaded(step, {"steps_done": step}, [])
        assert_equal(found, tensors(step, scale=1000))
        (directory(tmp_path, step) / RECORD_NAME).unlink()


def test_the_memory_of_the_copies_is_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path), RUN, 9)
    changing = tensors(0)
    first, second = (checkpoints._copied(changing) for _ in range(2))
    assert {name: part.data_ptr() for name, part in first.items()} == {n: p.data_ptr() for n, p in second.items()}


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 10, 20, 30, 40, keep=2)
    assert checkpoints.steps() == [40, 30]
    assert sorted(path.name for path in directory(tmp_path, 40).parent.iterdir()) == ["step-00000030", "step-00000040"]


def test_what_a_cut_off_save_left_goes_when_no_save_can_be_under_way_there(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 10, 20, keep=1)
    for step in (15, 25):
        directory(tmp_path, step).mkdir()
        (directory(tmp_path, step) / "model-0.safetensors").write_bytes(b"begun")
    assert checkpoints.steps() == [20]
    checkpoints.save(30, tensors(30), {}, wait=True)
    assert not directory(tmp_path, 15).exists()
    assert directory(tmp_path, 25).exists()
    checkpoints.save(40, tensors(40), {}, wait=True)
    assert sorted(path.name for path in directory(tmp_path, 40).parent.iterdir()) == ["step-00000040"]


def test_what_a_cut_off_save_left_is_never_mixed_with_a_later_one_of_the_same_step(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 10, 20)
    (directory(tmp_path, 20) / RECORD_NAME).unlink()
    left = model_file(tmp_path, 20)
    checkpoints.save(20, tensors(7), {"steps_done": 20}, wait=True)
    found = zeros(tensors(0))
    assert checkpoints.load_newest(found) == Loaded(20, {"steps_done": 20}, [])
    assert_equal(found, tensors(7))
    assert left.exists(), "another replica may be about to save the same step"
    checkpoints.clean()
    assert not left.exists()
    assert checkpoints.load_newest(found) == Loaded(20, {"steps_done": 20}, [])


@pytest.mark.parametrize("moment", ["faults", "_fill"])
def test_a_checkpoint_that_is_removed_while_it_is_loaded_is_not_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Replicas that train go on saving, and remove the one that a replacement loads: it takes their newest."""
    told: list[str] = []
    loading, training = Checkpoints(str(tmp_path), RUN, 2, on_broken=told.append), saved(tmp_path, 10, keep=1)
    target = loading._directory if moment == "faults" else loading
    original = getattr(target, moment)
    steps = iter([20])

    def overtaken(*args: object) -> object:
        for step in steps:
            training.save(step, tensors(step), {"steps_done": step}, wait=True)
        return original(*args)

    monkeypatch.setattr(target, moment, overtaken)
    found = zeros(tensors(0))
    assert loading.load_newest(found) == Loaded(20, {"steps_done": 20}, [])
    assert_equal(found, tensors(20))
    assert told == []
    assert not list(tmp_path.rglob("broken.json"))


def test_files_that_were_being_written_are_removed_once_they_are_old(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 10)
    (tmp_path / "_temporary").mkdir()
    old, young = tmp_path / "_temporary" / "old", tmp_path / "_temporary" / "young"
    for path in (old, young):
        path.write_bytes(b"part of a tensor")
    os.utime(old, (0, 0))
    checkpoints.save(20, tensors(20), {}, wait=True)
    assert (old.exists(), young.exists()) == (False, True)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped": (flip, "has changed since it was written"),
    "cut": (cut, "bytes, not"),
    "missing": (Path.unlink, "is missing"),
    "empty": (lambda path: path.write_bytes(b""), "holds 0 bytes"),
}


@pytest.mark.parametrize(("damage", "kind"), list(zip(DAMAGE, ["model", "exp_avg_sq", "step", "exp_avg"], strict=True)))
def test_a_broken_file_is_told_and_the_checkpoint_before_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str, kind: str
) -> None:
    saved(tmp_path, 10, 20)
    told: list[str] = []
    checkpoints = Checkpoints(str(tmp_path), RUN, 9, on_broken=told.append)
    path = next(directory(tmp_path, 20).glob(f"{kind}-*"))
    break_it, says = DAMAGE[damage]
    break_it(path)
    found = zeros(tensors(0))
    with caplog.at_level(logging.WARNING, "pipelines.train.checkpoints"):
        loaded = checkpoints.load_newest(found)
    assert loaded is not None
    assert (loaded.step, loaded.state) == (10, {"steps_done": 10})
    assert_equal(found, tensors(10))
    (fault,) = loaded.passed_over
    assert str(path) in fault
    assert says in fault
    assert fault in caplog.text
    assert told == [fault]
    assert checkpoints.steps() == [10]
    assert (directory(tmp_path, 20) / "broken.json").exists()


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", pickle.dumps([1]), b"{}", b'{"step": 20}', b"[1, 2]"])
def test_what_is_no_record(data: bytes) -> None:
    with pytest.raises(ValueError, match="is no record of a checkpoint"):
        decode_record(data)


def test_a_broken_record_is_told_and_the_checkpoint_before_taken(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 10, 20)
    flip(directory(tmp_path, 20) / RECORD_NAME)
    loaded = checkpoints.load_newest(zeros(tensors(0)))
    assert loaded is not None
    assert loaded.step == 10
    assert str(directory(tmp_path, 20) / RECORD_NAME) in loaded.passed_over[0]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(min_value=0), bit=st.integers(0, 7))
def test_no_bit_of_a_record_flips_unseen(tmp_path: Path, position: int, bit: int) -> None:
    root = tmp_path / "run"
    if not root.exists():
        saved(root, 10)
    data = bytearray((directory(root, 10) / RECORD_NAME).read_bytes())
    data[position % len(data)] ^= 1 << bit
    with pytest.raises(ValueError, match=r"is no record|has changed"):
        decode_record(bytes(data))


def test_a_run_whose_checkpoints_are_all_broken_does_not_begin_anew(tmp_path: Path) -> None:
    """Nor when it is tried again; with one of them mended it goes on from that."""
    checkpoints = saved(tmp_path, 10, 20)
    for step in (10, 20):
        flip(model_file(tmp_path, step))
    for _ in range(2):
        with pytest.raises(CheckpointError, match="every checkpoint of this run is broken") as raised:
            checkpoints.load_newest(zeros(tensors(0)))
        assert f"{RUN}: " in str(raised.value)
        assert "step-00000020/broken.json, step-00000010/broken.json" in str(raised.value)
    flip(model_file(tmp_path, 10))
    (directory(tmp_path, 10) / "broken.json").rename(directory(tmp_path, 10) / RECORD_NAME)
    assert checkpoints.load_newest(zeros(tensors(0))) == Loaded(10, {"steps_done": 10}, [])


def test_a_broken_checkpoint_is_made_again(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 10, 20)
    flip(model_file(tmp_path, 20))
    loaded = checkpoints.load_newest(zeros(tensors(0)))
    assert loaded is not None
    assert loaded.step == 10
    checkpoints.save(20, tensors(20), {"steps_done": 20}, wait=True)
    assert checkpoints.load_newest(zeros(tensors(0))) == Loaded(20, {"steps_done": 20}, [])
    assert not list(tmp_path.rglob("broken.json"))


def test_another_runs_checkpoint_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, 10)
    directory(tmp_path, 10).parent.rename(tmp_path / "checkpoints" / "other")
    with pytest.raises(CheckpointError, match=rf"step-00000010: belongs to another run \({RUN}, not other\)"):
        Checkpoints(str(tmp_path), "other", 2).load_newest(tensors(0))
    with pytest.raises(CheckpointError, match="belongs to another run"):
        Checkpoints(str(tmp_path), "other", 2).load_model(10, {"w": torch.zeros(5, 3)})


def test_runs_beside_each_other(tmp_path: Path) -> None:
    saved(tmp_path, 10)
    other = Checkpoints(str(tmp_path), f"{RUN}b", 1)
    assert other.load_newest(tensors(0)) is None
    other.save(99, tensors(1), {}, wait=True)
    assert Checkpoints(str(tmp_path), RUN, 1).steps() == [10]


def test_tensors_that_do_not_fit(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 10, 20)
    fewer = {name: tensor for name, tensor in tensors(0).items() if name != "model.w"}
    for wanted, says in (
        (tensors(0) | {"model.w": torch.zeros(3, 5)}, r"model\.w has shape \[5, 3\], not \[3, 5\]"),
        (tensors(0) | {"model.more": torch.zeros(1)}, r"holds no tensor model\.more"),
        (fewer, r"holds tensors of another model, such as model\.w"),
    ):
        with pytest.raises(CheckpointError, match=rf"step-00000020: {says}"):
            checkpoints.load_newest(wanted)
    assert checkpoints.steps() == [20, 10]


def test_load_model_reads_the_weights_alone(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 10)
    for path in directory(tmp_path, 10).glob("*.safetensors"):
        if not path.name.startswith("model-"):
            path.unlink()
    weights = {name.removeprefix("model."): tensor for name, tensor in zeros(tensors(0)).items() if "model" in name}
    checkpoints.load_model(10, weights)
    assert_equal({f"model.{name}": tensor for name, tensor in weights.items()}, _of_kind(tensors(10), "model"))


def _of_kind(of: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in of.items() if name.startswith(f"{kind}.")}


def test_load_model_refuses_what_is_broken_or_not_there(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 10)
    flip(model_file(tmp_path, 10))
    with pytest.raises(CheckpointError, match=r"model-\w+\.safetensors: has changed"):
        checkpoints.load_model(10, {"w": torch.zeros(5, 3)})
    with pytest.raises(CheckpointError, match="step-00000020"):
        checkpoints.load_model(20, {"w": torch.zeros(5, 3)})


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_nothing_is_pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = saved(tmp_path, 10, 20)
    exploded, bomb = tmp_path / "exploded", pickle.dumps(Bomb(tmp_path / "exploded"))
    for name in (".metadata", "__0_0.distcp", "model-0.safetensors"):
        (directory(tmp_path, 10) / name).write_bytes(bomb)
    model_file(tmp_path, 20).write_bytes(bomb)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("something was unpickled")

    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, refuse)
    loaded = checkpoints.load_newest(zeros(tensors(0)))
    assert loaded is not None
    assert loaded.step == 10
    assert not exploded.exists()


def test_what_is_not_for_a_checkpoint(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path), RUN, 2)
    with pytest.raises(CheckpointError, match=r"model\.w: a checkpoint cannot hold torch\.complex64"):
        checkpoints.save(1, {"model.w": torch.zeros(2, dtype=torch.complex64)}, {}, wait=True)
    with pytest.raises(CheckpointError, match=r"model\.w: a checkpoint holds tensors alone"):
        checkpoints.save(1, {"model.w": 3}, {}, wait=True)  # type: ignore[dict-item]
    assert files(tmp_path) == []


def test_a_save_that_fails_in_the_background_is_told(tmp_path: Path) -> None:
    failed: list[CheckpointError] = []
    told: list[Saved] = []
    checkpoints = Checkpoints(str(tmp_path), RUN, 2, on_saved=told.append, on_failed=failed.append)
    directory(tmp_path, 20).parent.mkdir(parents=True)
    directory(tmp_path, 20).write_text("in the way of the directory")
    for step in (10, 20, 30):
        checkpoints.save(step, tensors(step), {}, wait=False)
    checkpoints.wait()
    assert [one.step for one in told] == [10, 30]
    (error,) = failed
    assert "step-00000020: cannot be written" in str(error)
    assert "\n" not in str(error)
    assert checkpoints.steps() == [30, 10]
    with pytest.raises(CheckpointError, match="step-00000020: cannot be written"):
        checkpoints.save(20, tensors(20), {}, wait=True)


@pytest.fixture
def ranges(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of the ranges that are read while a test runs."""
    lengths: list[int] = []
    read_range = Storage.read_range

    def read(self: Storage, path: str, start: int, end: int) -> bytes:
        lengths.append(end - start)
        return read_range(self, path, start, end)

    monkeypatch.setattr(Storage, "read_range", read)
    return lengths


def test_small_tensors_are_read_together(tmp_path: Path, ranges: list[int]) -> None:
    checkpoints = Checkpoints(str(tmp_path), RUN, 2)
    many = {f"model.w{i}": torch.full((i,), float(i)) for i in range(1, 200)}
    checkpoints.save(1, many, {}, wait=True)
    found = zeros(many)
    checkpoints.load_newest(found)
    assert_equal(found, many)
    assert ranges == [sum(tensor.nbytes for tensor in many.values())]


def test_large_tensors_are_read_and_written_in_pieces(
    tmp_path: Path, ranges: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_files, "READ_BYTES", 100)
    monkeypatch.setattr(checkpoint_files, "FILE_BYTES", 500)
    expected = tensors(10, scale=20) | {"model.wide": torch.randn(2, 70)}
    checkpoints = Checkpoints(str(tmp_path), RUN, 2)
    checkpoints.save(10, expected, {}, wait=True)
    found = zeros(expected)
    checkpoints.load_newest(found)
    assert_equal(found, expected)
    assert max(ranges) == 280  # one row of the wide one
    assert sorted(ranges)[-3] <= 100
    assert len(list(directory(tmp_path, 10).glob("model-*"))) > 2


def test_headers_are_those_of_safetensors(tmp_path: Path) -> None:
    """Aligned, and saying what lies where."""
    saved(tmp_path, 10)
    for path in directory(tmp_path, 10).glob("*.safetensors"):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        del header["__metadata__"]
        assert length % 8 == 0
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            tensor = tensors(10)[name]
            assert begin % tensor.itemsize == 0
            assert data[8 + length :][begin:end] == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_a_checkpoint_that_was_made_again_meanwhile_is_not_set_aside(tmp_path: Path) -> None:
    saved(tmp_path, 10)
    checkpoints = CheckpointDirectory(Storage(str(tmp_path)), RUN)
    judged = checkpoints.record_bytes(10)
    saved(tmp_path, 10)
    checkpoints.set_aside(10, judged)
    assert checkpoints.steps() == [10]
    checkpoints.set_aside(10, checkpoints.record_bytes(10))
    assert checkpoints.steps() == []
    checkpoints.set_aside(10, judged)
    assert checkpoints.newest() is None
