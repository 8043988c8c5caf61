"""Tensors to save, and a run with checkpoints of them."""

from pathlib import Path

import torch
from torch import Tensor

from pipelines.train.checkpoints import Checkpoints

RUN = "a" * 16


def tensors(seed: int, scale: int = 1) -> dict[str, Tensor]:
    """Of several kinds, types and shapes, drawn by `seed`."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"w": (5 * scale, 3), "norm": (7,), "conv": (2, 3, 4)}
    drawn = {
        f"{kind}.{name}": torch.randn(shape, generator=generator)
        for kind in ("model", "exp_avg", "exp_avg_sq")
        for name, shape in shapes.items()
    }
    return drawn | {
        "model.half": torch.randn(3, 2, generator=generator).bfloat16(),
        "model.ids": torch.randint(2**40, (4,), generator=generator),
        "model.mask": torch.rand(9, generator=generator) > 0.5,
        "step.w": torch.tensor(float(seed)),
    }


def zeros(like: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in like.items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


def saved(root: Path | str, *steps: int, keep: int = 9) -> Checkpoints:
    """A run with a checkpoint of `tensors(step)` at each of these steps."""
    checkpoints = Checkpoints(str(root), RUN, keep)
    for step in steps:
        checkpoints.save(step, tensors(step), {"steps_done": step}, wait=True)
    return checkpoints


def directory(root: Path, step: int) -> Path:
    return root / "checkpoints" / RUN / f"step-{step:08d}"


def files(root: Path) -> list[str]:
    """Every file below the root, what is being written included."""
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
