"""Where each byte's patches are: patch lengths in, per-byte patch indices and per-patch documents out.

In: patch_lengths int64 [B,P] that include the virtual next byte (sum T + 1, first patch 1, zeros trailing) and
document ids [B,T]. Out: `PatchLayout`. All O(T + P). Source: arXiv 2412.09871.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from blt.attention import document_starts, documents_from_eos
from blt.vocabulary import EOS, VOCABULARY_SIZE


@dataclass(frozen=True)
class PatchLayout:
    """Patch indices flattened over the batch (row * P + patch), int64 [B*T], and the patches' documents and positions.

    encoder_patch: the patch that byte i belongs to. decoder_patch: the newest patch complete at byte i, that is the
    patch of byte i + 1 less one. document_ids, positions: of the bytes, [B,T]; patch_document_ids, patch_positions:
    of the patches, [B,P]; equal numbers along a row are one document.
    """

    num_patches: int
    encoder_patch: Tensor
    decoder_patch: Tensor
    document_ids_BT: Tensor
    positions_BT: Tensor
    patch_document_ids_BP: Tensor
    patch_positions_BP: Tensor


def patch_layout(byte_ids_BT: Tensor, patch_lengths_BP: Tensor, document_ids_BT: Tensor | None) -> PatchLayout:
    """The layout of a batch, checked.

    Raises ValueError if shapes, dtypes or sums are wrong, or a document of `document_ids_BT` does not open with a
    one-byte patch (its first byte would read the previous document's last patch).
    """
    _check(byte_ids_BT, patch_lengths_BP, document_ids_BT)
    batch, length = byte_ids_BT.shape
    num_patches = patch_lengths_BP.shape[1]
    ends = patch_lengths_BP.cumsum(1)
    starts = torch.where(patch_lengths_BP > 0, ends - patch_lengths_BP, length + 1)
    opens = torch.zeros(batch, length + 2, dtype=torch.int64, device=byte_ids_BT.device)
    opens.scatter_(1, starts, 1)
    patch_of = opens[:, : length + 1].cumsum(1) - 1
    row = torch.arange(batch, device=byte_ids_BT.device)[:, None] * num_patches
    place = torch.arange(length, device=byte_ids_BT.device).expand(batch, length)
    first_byte = starts.clamp(max=length - 1)
    if document_ids_BT is None:
        documents, positions = documents_from_eos(byte_ids_BT), place
        holds_eos = torch.zeros(batch, num_patches, dtype=torch.int64, device=byte_ids_BT.device)
        holds_eos.scatter_reduce_(1, patch_of[:, :length], (byte_ids_BT == EOS).long(), "amax")
        patch_documents = holds_eos.cumsum(1) - holds_eos
        patch_positions = torch.arange(num_patches, device=byte_ids_BT.device).expand(batch, num_patches)
    else:
        first = document_starts(document_ids_BT)
        documents, positions = document_ids_BT, place - torch.where(first, place, 0).cummax(1).values
        _check_openings(first & (document_ids_BT >= 0), opens)
        # Numbers of runs, not ids: an id that comes back after padding inside a patch must not join two documents.
        patch_documents = torch.where(starts <= length, first.cumsum(1).gather(1, first_byte), -1)
        patch_place = torch.arange(num_patches, device=byte_ids_BT.device).expand(batch, num_patches)
        patch_first = torch.where(document_starts(patch_documents), patch_place, 0).cummax(1).values
        patch_positions = patch_place - patch_first
    return PatchLayout(
        num_patches=num_patches,
        encoder_patch=(patch_of[:, :length] + row).flatten(),
        decoder_patch=(patch_of[:, 1:] - 1 + row).flatten(),
        document_ids_BT=documents,
        positions_BT=positions,
        patch_document_ids_BP=patch_documents,
        patch_positions_BP=patch_positions,
    )


def _check(byte_ids_BT: Tensor, patch_lengths_BP: Tensor, document_ids_BT: Tensor | None) -> None:
    if byte_ids_BT.dim() != 2 or byte_ids_BT.dtype != torch.int64 or byte_ids_BT.shape[1] == 0:
        raise ValueError(f"byte_ids must be int64 [B,T] with T >= 1, got {_told(byte_ids_BT)}")
    if bool(((byte_ids_BT < 0) | (byte_ids_BT >= VOCABULARY_SIZE)).any()):
        raise ValueError(f"byte_ids must lie between 0 and {VOCABULARY_SIZE - 1}")
    batch, length = byte_ids_BT.shape
    if patch_lengths_BP.dim() != 2 or patch_lengths_BP.dtype != torch.int64 or patch_lengths_BP.shape[0] != batch:
        raise ValueError(f"patch_lengths must be int64 [{batch},P], got {_told(patch_lengths_BP)}")
    if document_ids_BT is not None and (document_ids_BT.dtype, document_ids_BT.shape) != (
        torch.int64,
        byte_ids_BT.shape,
    ):
        raise ValueError(f"document_ids must be int64 [{batch},{length}], got {_told(document_ids_BT)}")
    if patch_lengths_BP.shape[1] == 0 or bool((patch_lengths_BP[:, 0] != 1).any()):
        raise ValueError("patch_lengths: the first patch of every row must be one byte long")
    if bool((patch_lengths_BP < 0).any()):
        raise ValueError("patch_lengths must not be negative")
    if bool((patch_lengths_BP.sum(1) != length + 1).any()):
        sums = patch_lengths_BP.sum(1).tolist()
        raise ValueError(f"patch_lengths must sum to T + 1 = {length + 1} (the next byte included), got sums {sums}")
    if bool(((patch_lengths_BP[:, :-1] == 0) & (patch_lengths_BP[:, 1:] > 0)).any()):
        raise ValueError("patch_lengths: zeros must only trail")


def _check_openings(first_BT: Tensor, opens: Tensor) -> None:
    """A document's first byte and the byte after it must both open a patch."""
    length = first_BT.shape[1]
    bad = first_BT & ~((opens[:, :length] == 1) & (opens[:, 1 : length + 1] == 1))
    if bool(bad.any()):
        row, place = torch.nonzero(bad)[0].tolist()
        raise ValueError(f"document_ids: the document at row {row}, byte {place} must open with a one-byte patch")


def _told(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
