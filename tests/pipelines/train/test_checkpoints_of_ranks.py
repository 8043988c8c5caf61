"""Checkpoints of several processes: what one number of ranks saves, another loads, and all ranks agree on what is sound
and on what failed.
"""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from blt.errors import CheckpointError
from pipelines.train.checkpoints import Checkpoints, Loaded, Saved
from tests.gloo import run_ranks

RUN = "b" * 16
KEEP = 5


def full(seed: int) -> dict[str, Tensor]:
    """Whole tensors, drawn by `seed`. Their sizes are no multiples of a number of ranks, some smaller than it."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"table": (11, 7), "linear": (5, 3), "short": (1, 4), "norm": (2,), "copy": (3, 3)}
    return {
        f"{kind}.{name}": torch.randn(shape, generator=generator)
        for kind in ("model", "exp_avg")
        for name, shape in shapes.items()
    } | {"step.table": torch.tensor(float(seed))}


def spread(whole: dict[str, Tensor]) -> dict[str, Tensor]:
    """As training holds them: tables by columns, the others by rows, some as they are."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    placements = {"table": Shard(1), "linear": Shard(0), "short": Shard(0), "norm": Shard(0), "copy": Replicate()}
    return {
        name: distribute_tensor(tensor, mesh, [placements[name.partition(".")[2]]]) if tensor.ndim else tensor.clone()
        for name, tensor in whole.items()
    }


def gathered(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor for name, tensor in tensors.items()
    }


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def save_steps(root: str, steps: list[int], wait: bool) -> list[int]:
    """Save `full(step)` at each step, the tensors changing in place; the steps that rank 0 was told of."""
    told: list[Saved] = []
    checkpoints = Checkpoints(root, RUN, KEEP, on_saved=told.append)
    tensors = spread(full(0))
    for step in steps:
        for name, tensor in spread(full(step)).items():
            tensors[name].copy_(tensor)
        checkpoints.save(step, tensors, {"steps_done": step}, wait=wait)
        for tensor in tensors.values():
            tensor.zero_()
    checkpoints.wait()
    return [one.step for one in told]


def load_newest(root: str) -> tuple[Loaded | None, bool]:
    """What is loaded, and whether every tensor is what `full` of that step says."""
    tensors = spread({name: torch.zeros_like(tensor) for name, tensor in full(0).items()})
    loaded = Checkpoints(root, RUN, KEEP).load_newest(tensors)
    return loaded, loaded is not None and equal(gathered(tensors), full(loaded.step))


def saved_alone(root: str, steps: list[int], keep: int = 2) -> Checkpoints:
    """By one process, without a group."""
    checkpoints = Checkpoints(root, RUN, keep)
    for step in steps:
        checkpoints.save(step, full(step), {"steps_done": step}, wait=True)
    return checkpoints


def zeros() -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in full(0).items()}


def attempt(work: Callable[[], object]) -> str:
    """What a CheckpointError says; "" without one."""
    try:
        work()
    except CheckpointError as error:
        return str(error)
    return ""


def directory(root: Path, step: int) -> Path:
    return root / "checkpoints" / RUN / f"step-{step:08d}"


def save_both_ways(root: str) -> list[list[int]]:
    """To ROOT/waiting and ROOT/background; the steps that were told."""
    return [save_steps(f"{root}/{name}", [10, 20], wait=name == "waiting") for name in ("waiting", "background")]


@pytest.mark.slow
def test_saved_by_two_ranks_and_loaded_by_any_number(tmp_path: Path) -> None:
    assert run_ranks(2, save_both_ways, str(tmp_path)) == [[[10, 20], [10, 20]], [[], []]]
    waiting, background = (str(tmp_path / name) for name in ("waiting", "background"))
    assert _contents(Path(waiting)) == _contents(Path(background))
    for world_size in (1, 3):
        for found in run_ranks(world_size, load_newest, background):
            assert found == (Loaded(20, {"steps_done": 20}, []), True)
    found_alone = zeros()
    Checkpoints(waiting, RUN, KEEP).load_newest(found_alone)
    assert equal(found_alone, full(20))
    weights = {name.removeprefix("model."): tensor for name, tensor in zeros().items() if name.startswith("model.")}
    Checkpoints(waiting, RUN, KEEP).load_model(10, weights)
    assert all(torch.equal(tensor, full(10)[f"model.{name}"]) for name, tensor in weights.items())


def _contents(root: Path) -> list[tuple[int, str, bytes]]:
    """Data files by step and kind; their names are drawn."""
    files = [(step, path) for step in (10, 20) for path in directory(root, step).glob("*.safetensors")]
    assert len(files) == 2 * len(["model", "model", "exp_avg", "exp_avg", "step"])
    return sorted((step, path.name.partition("-")[0], path.read_bytes()) for step, path in files)


def meet_failures(root: str) -> dict[str, str]:
    """What each failure of one rank raises on this one."""
    save_steps(root, [10], True)
    told: list[CheckpointError] = []
    own_directory = f"{root}/node{dist.get_rank()}"
    raised = {"not shared": attempt(lambda: save_steps(own_directory, [10], True))}

    checkpoints = Checkpoints(root, RUN, KEEP, on_failed=told.append)
    if dist.get_rank() == 1:
        checkpoints._directory.storage.create = _no_space  # type: ignore[method-assign,assignment]
    raised["full disk"] = attempt(lambda: checkpoints.save(20, spread(full(20)), {}, wait=True))
    checkpoints.save(30, spread(full(30)), {}, wait=False)
    checkpoints.wait()
    raised["full disk, told"] = "; ".join(str(error) for error in told)

    checkpoints = Checkpoints(root, RUN, KEEP)
    if dist.get_rank() == 0:
        checkpoints._directory.storage.read_bytes = _input_error  # type: ignore[method-assign,assignment]
    raised["record"] = attempt(lambda: checkpoints.load_newest(spread(full(0))))

    checkpoints = Checkpoints(root, RUN, KEEP)
    if dist.get_rank() == 1:
        checkpoints._directory.storage.read_range = _input_error  # type: ignore[method-assign,assignment]
    raised["tensors"] = attempt(lambda: checkpoints.load_newest(spread(full(0))))
    return raised


def _no_space(path: str) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


def _input_error(path: str, *_: int) -> bytes:
    raise OSError(errno.EIO, os.strerror(errno.EIO), path)


@pytest.mark.slow
def test_a_failure_of_one_rank_is_one_of_all(tmp_path: Path) -> None:
    first, second = run_ranks(2, meet_failures, str(tmp_path))
    assert "step-00000030: cannot be written: rank 1: [Errno 28] No space left" in first.pop("full disk, told")
    assert second.pop("full disk, told") == ""
    assert first["full disk"] == second["full disk"]
    assert "step-00000020: cannot be written: rank 1: [Errno 28] No space left" in first["full disk"]
    assert "the output must be a directory that all nodes share" in first["not shared"]
    assert "the output must be a directory that all nodes share" in second["not shared"]
    assert first["record"].startswith("rank 0: [Errno 5] Input/output error")
    assert first["record"] == second["record"]
    assert "step-00000010: cannot be read: rank 1: [Errno 5] Input/output error" in first["tensors"]
    assert first["tensors"] == second["tensors"]
    assert {path.parent for path in tmp_path.rglob("*") if path.is_file()} == {directory(tmp_path, 10)}


@pytest.mark.slow
def test_all_ranks_go_back_to_the_same_checkpoint(tmp_path: Path) -> None:
    saved_alone(str(tmp_path), [10, 20, 30], keep=3)
    for step, break_it in ((30, _flip), (20, Path.unlink)):
        break_it(max(directory(tmp_path, step).glob("*.safetensors")))
    for loaded, is_equal in run_ranks(2, load_newest, str(tmp_path)):
        assert loaded is not None
        assert (loaded.step, is_equal) == (10, True)
        assert [text.split(": ")[1] for text in loaded.passed_over] == [
            "has changed since it was written",
            "is missing",
        ]


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
