"""Hash n-gram embeddings: byte ids in, the sum of one table row for each hash function and n-gram size out.

Shapes: B rows, T bytes of a row, G n-gram sizes, D width. Each position hashes the n bytes that end at it; ids left of
the row, or left of the document's first byte where positions are given, count as 0.
Source: BLT (arXiv 2412.09871) section 3.2.1. The sum is plain, without the paper's division by the number of sizes, as
in the released weights.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blt.errors import ConfigError

PRIMES = (
    1000000007,
    5915587277,
    1500450271,
    3267000013,
    5754853343,
    4093082899,
    9576890767,
    3628273133,
    2860486313,
    5463458053,
    3367900313,
)
"""Prime of each hash function, in order; there are no more functions than primes."""


def hash_ids(byte_ids_BT: Tensor, group_size: int, function: int, table_size: int) -> Tensor:
    """Table rows int64 [B, T] in 0..table_size - 1 of the `group_size` bytes that end at each position.

    `function` is an index into PRIMES. With w_0 the oldest byte id of the window and p the prime, the hash is
    sum_j w_j p^j in wrapping signed 64-bit arithmetic, and the row its non-negative remainder by `table_size`. A size
    or function that does not exist, or ids that are not integers of shape [B, T], are a ValueError.
    """
    if table_size < 1:
        raise ValueError(f"table_size must be at least 1, got {table_size}")
    return rolling_hashes(byte_ids_BT, None, (group_size,), function)[..., 0] % table_size


def rolling_hashes(
    byte_ids_BT: Tensor, positions_BT: Tensor | None, group_sizes: Sequence[int], function: int
) -> Tensor:
    """Hashes int64 [B, T, G], before the remainder, for every size of `group_sizes` in its order.

    `positions_BT` (int64) holds each byte's index inside its document: ids before index 0 count as 0, so no window
    reaches into the previous document; None reads on through the row. All sizes together cost one multiply-add for each
    byte of the largest: A_1(i) = x_i, A_{n+1}(i) = A_n(i) * p + x_{i-n}, where A_n is the hash of size n.
    """
    if byte_ids_BT.ndim != 2 or byte_ids_BT.is_floating_point() or byte_ids_BT.dtype == torch.bool:
        raise ValueError(f"byte_ids must be integers [B, T], got {byte_ids_BT.dtype} {list(byte_ids_BT.shape)}")
    if not group_sizes or min(group_sizes) < 1:
        raise ValueError(f"n-gram sizes must be at least 1, got {list(group_sizes)}")
    if not 0 <= function < len(PRIMES):
        raise ValueError(f"function must lie in 0..{len(PRIMES) - 1}, got {function}")
    ids_BT = byte_ids_BT.to(torch.int64)
    hash_BT = ids_BT
    hashes: dict[int, Tensor] = {1: hash_BT}
    for distance in range(1, max(group_sizes)):
        earlier_BT = F.pad(ids_BT, (distance, 0))[:, : ids_BT.shape[1]]
        if positions_BT is not None:
            earlier_BT = earlier_BT * (positions_BT >= distance)
        hash_BT = hash_BT * PRIMES[function] + earlier_BT
        hashes[distance + 1] = hash_BT
    return torch.stack([hashes[size] for size in group_sizes], dim=-1)


class HashEmbedding(nn.Module):
    """Sum of `functions` x len(`group_sizes`) table lookups for each byte.

    One parameter `table` [functions * len(group_sizes) * table_size, D] holds the tables one after the other, in the
    order for function: for size. Values that make no table are a ConfigError.
    """

    def __init__(
        self,
        *,
        group_sizes: tuple[int, ...],
        functions: int,
        table_size: int,
        width: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not group_sizes or min(group_sizes) < 1:
            raise ConfigError(f"hash n-gram sizes must be one or more numbers of at least 1, got {list(group_sizes)}")
        if not 1 <= functions <= len(PRIMES):
            raise ConfigError(f"the number of hash functions must lie in 1..{len(PRIMES)}, got {functions}")
        if table_size < 1:
            raise ConfigError(f"the hash table size must be at least 1, got {table_size}")
        self.group_sizes = group_sizes
        self.functions = functions
        self.table_size = table_size
        num_rows = functions * len(group_sizes) * table_size
        self.table = nn.Parameter(torch.empty(num_rows, width, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal of standard deviation D^-0.5, cut at three of them."""
        std = self.table.shape[1] ** -0.5
        nn.init.trunc_normal_(self.table, std=std, a=-3 * std, b=3 * std)

    def table_rows(self, byte_ids_BT: Tensor, positions_BT: Tensor | None = None) -> Tensor:
        """Rows of `table` that each byte reads, int64 [B, T, functions * G]; positions as in `rolling_hashes`."""
        hashes = [rolling_hashes(byte_ids_BT, positions_BT, self.group_sizes, f) for f in range(self.functions)]
        return self._rows(torch.cat(hashes, dim=-1))

    def forward(self, byte_ids_BT: Tensor, positions_BT: Tensor | None = None) -> Tensor:
        """Embeddings [B, T, D] in the dtype of the table; `positions_BT` as in `rolling_hashes`."""
        rows_BTG = self.table_rows(byte_ids_BT, positions_BT)
        return self.summed(rows_BTG.flatten(0, 1)).view(*byte_ids_BT.shape, self.table.shape[1])

    def summed(self, rows_NG: Tensor) -> Tensor:
        """Sums [N, D] of table rows."""
        return F.embedding_bag(rows_NG, self.table, mode="sum")

    def window_weights(self, device: torch.device) -> Tensor:
        """What a window of ids [B, L] is multiplied with and summed over to give the hashes of its end, int64 [L, G].

        Hashes are linear in the ids, so they are the hashes of the windows that hold a single 1. L is the largest size.
        """
        ones = torch.eye(max(self.group_sizes), dtype=torch.int64, device=device)
        return torch.cat([rolling_hashes(ones, None, self.group_sizes, f)[:, -1] for f in range(self.functions)], -1)

    def window_rows(self, ids_BL: Tensor, weights_LG: Tensor) -> Tensor:
        """Rows of `table` that the last byte of each window reads, int64 [B, functions * G]."""
        return self._rows((ids_BL[..., None] * weights_LG).sum(1))

    def _rows(self, hashes: Tensor) -> Tensor:
        first_row_G = torch.arange(hashes.shape[-1], device=hashes.device) * self.table_size
        return hashes % self.table_size + first_row_G

    def extra_repr(self) -> str:
        return f"group_sizes={self.group_sizes}, functions={self.functions}, table_size={self.table_size}"


class HashWindows:
    """The ids that the next bytes of B growing documents hash: the end of each document, L = the largest size."""

    def __init__(self, embedding: HashEmbedding, num_documents: int) -> None:
        self.embedding, device = embedding, embedding.table.device
        self._weights_LG = embedding.window_weights(device)
        self.ids_BL = torch.zeros(num_documents, len(self._weights_LG), dtype=torch.int64, device=device)

    def load(self, document: int, ids_T: Tensor) -> None:
        """Begin a document with these ids."""
        length = self.ids_BL.shape[1]
        self.ids_BL[document] = F.pad(ids_T[-length:], (length - min(length, len(ids_T)), 0))

    def step(self, ids_B: Tensor) -> Tensor:
        """Embeddings [B, D] of one more id of each document."""
        self.ids_BL = torch.cat((self.ids_BL[:, 1:], ids_B[:, None]), 1)
        return self.read(self.ids_BL)

    def read(self, ids_BL: Tensor) -> Tensor:
        """Embeddings [B, D] of the last id of each window."""
        return self.embedding.summed(self.embedding.window_rows(ids_BL, self._weights_LG))

    def keep(self, documents: Sequence[int]) -> None:
        """Only these documents go on, in this order."""
        self.ids_BL = self.ids_BL[torch.tensor(documents, device=self.ids_BL.device)]
