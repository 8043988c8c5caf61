"""Bytes of tensors that are alive: operations in, what their results take now and took at most out.

Every operation is seen, those of custom autograd functions, of recomputation and of the backward pass included, on any
device; on the meta device nothing is computed. A storage counts once, whoever holds it, from the operation that made it
until the last tensor or saved value that uses it is gone. What operations take inside themselves is not seen.
"""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While it is on, counts the storages that operations make; those of `known` tensors are left out."""

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0
        """Alive now."""
        self._most = 0
        self._known = [tensor.untyped_storage() for tensor in known]  # kept, so that none is taken for a new one
        self._known_ids = {id(storage) for storage in self._known}
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return out

    def lap(self) -> int:
        """The most at any time since the lap before."""
        most, self._most = self._most, self.bytes
        return most

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._alive or key in self._known_ids:
            return

        def gone(_: object) -> None:
            del self._alive[key]
            self.bytes -= size

        self._alive[key] = weakref.ref(storage, gone)
        self.bytes += size
        self._most = max(self._most, self.bytes)
