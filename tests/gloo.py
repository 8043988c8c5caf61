"""Processes of a gloo group on this machine (or of another backend's): a function in, what it returns on each rank out,
or what it raises."""

import datetime
import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Value = TypeVar("Value")


def run_ranks(world_size: int, function: Callable[..., Value], *args: Any, backend: str = "gloo") -> list[Value]:
    """What `function(*args)` returns on each rank; it must be importable, and its values picklable."""
    with tempfile.TemporaryDirectory(prefix="gloo-") as directory:
        mp.spawn(_rank, (world_size, directory, backend, function, args), nprocs=world_size)
        return [pickle.loads((Path(directory) / str(rank)).read_bytes()) for rank in range(world_size)]


def _rank(
    rank: int, world_size: int, directory: str, backend: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        backend,
        init_method=f"file://{directory}/store",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=60),
    )
    (Path(directory) / str(rank)).write_bytes(pickle.dumps(function(*args)))
    dist.destroy_process_group()
    # Not through the interpreter: a thread of gloo or autograd that asks for its lock at the end aborts the process.
    os._exit(0)
