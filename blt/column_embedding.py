"""The n-gram tables spread over ranks by columns: table rows of this rank's bytes in, their sums in full width out.

Every rank sums the rows of all ranks' bytes in its own columns, and one all-to-all sends each rank the sums of its
bytes: N x D numbers each way, whatever the number of tables. Gathering a table, as for other weights, would move
all its rows; exchanging rows moves as many times more as there are lookups. The gradient of a rank's columns comes
from all ranks' bytes on the way back, so it needs no other sum, and the optimiser's state stays with the columns.
Shapes: N bytes of this rank (ranks may differ), G lookups of a byte, D width, W ranks.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional as F

from blt.hash_embedding import HashEmbedding


class ColumnHashEmbedding(HashEmbedding):
    """A `HashEmbedding` whose `table` is a DTensor split by columns over the one dimension of a mesh.

    `forward` is a collective: every rank calls it equally often, with at least one byte each time.
    """

    def __init__(self, plain: HashEmbedding, mesh: DeviceMesh) -> None:
        nn.Module.__init__(self)
        self.group_sizes, self.functions, self.table_size = plain.group_sizes, plain.functions, plain.table_size
        self.mesh, full = mesh, plain.table
        self._widths = [len(columns) for columns in _columns(full.shape[1], mesh.size())]
        own = _columns(full.shape[1], mesh.size())[mesh.get_local_rank()]
        local = full.detach()[:, own.start : own.stop].clone()
        table = DTensor.from_local(local, mesh, [Shard(1)], run_check=False, shape=full.shape, stride=full.stride())
        self.table = nn.Parameter(table)

    def summed(self, rows_NG: Tensor) -> Tensor:
        """Sums [N, D] of table rows."""
        assert isinstance(self.table, DTensor)
        own_columns, group = self.table.to_local(), self.mesh.get_group()
        counts = self._counts(len(rows_NG))
        most = max(counts)
        gathered = rows_NG.new_empty(len(counts) * most, rows_NG.shape[1])
        dist.all_gather_single(gathered, F.pad(rows_NG, (0, 0, 0, most - len(rows_NG))), group=group)
        every_row = torch.cat([gathered[r * most : r * most + count] for r, count in enumerate(counts)])
        sums = F.embedding_bag(every_row, own_columns, mode="sum")
        received = all_to_all_single_autograd(
            sums.flatten(),
            [len(rows_NG) * width for width in self._widths],
            [count * sums.shape[1] for count in counts],
            group,
        )
        parts = received.split([len(rows_NG) * width for width in self._widths])
        return torch.cat([part.view(len(rows_NG), -1) for part in parts if part.numel()], 1)

    def _counts(self, own: int) -> list[int]:
        """Bytes of each rank."""
        counts = torch.empty(self.mesh.size(), dtype=torch.int64, device=self.mesh.device_type)
        dist.all_gather_single(counts, counts.new_tensor([own]), group=self.mesh.get_group())
        return [int(count) for count in counts.tolist()]


def _columns(width: int, ranks: int) -> list[range]:
    """Columns of each rank, as `Shard(1)` deals them: equal runs, the last ones shorter or empty."""
    each = -(-width // ranks)
    return [range(min(rank * each, width), min((rank + 1) * each, width)) for rank in range(ranks)]
