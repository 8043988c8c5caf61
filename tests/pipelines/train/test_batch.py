"""Batches: what the models accept, with padding and context that weigh nothing."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blt.entropy_model import EntropyModel, EntropyModelConfig
from blt.loss import NO_TARGET
from blt.model import BLT
from blt.step import Batch, tally_batch
from pipelines.train.batch import make_batch
from pipelines.train.packing import PackedSequence, RowGroup, cut_sequences, document_windows
from tests.model_cases import blt_config, randomised, transformer_config
from tests.pipelines.train.patched import (
    MAX_PATCH,
    Patched,
    naive_row_group,
    patched,
    patched_documents,
    random_document,
)
from tests.pipelines.train.plain_feed import PlainBatch, plain_batch, plain_sequences, unpacked

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def blt() -> BLT:
    return randomised(BLT(blt_config())).double()


@pytest.fixture(scope="module")
def entropy_model() -> EntropyModel:
    return randomised(EntropyModel(EntropyModelConfig(transformer=transformer_config()))).double()


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small lose by threads, a hundredfold on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def whole(group: RowGroup) -> PackedSequence:
    """A row group as one sequence."""
    (sequence,) = cut_sequences(group, None, 1000)
    return sequence


def as_lists(batch: Batch) -> PlainBatch:
    assert batch.patch_lengths_BP is not None
    tensors = (batch.byte_ids_BT, batch.targets_BT, batch.document_ids_BT, batch.patch_lengths_BP)
    assert {tensor.dtype for tensor in tensors} == {torch.int64}
    return PlainBatch(*(tensor.tolist() for tensor in tensors))


@given(patched_documents(), st.tuples(st.integers(2, 12), st.integers(MAX_PATCH, 30)), st.integers(1, 5))
def test_batches_are_those_of_an_id_at_a_time(documents: list[Patched], limits: tuple[int, int], rows: int) -> None:
    sequences, plain = (
        list(cut_sequences(naive_row_group(documents), *limits)),
        plain_sequences(documents, *limits),
    )
    for first in range(0, len(sequences) + 1, rows):  # the last one may be empty
        made = make_batch(sequences[first : first + rows], with_patches=True).to(CPU)
        assert as_lists(made) == plain_batch(plain[first : first + rows])


@given(patched_documents(), st.tuples(st.integers(2, 12), st.integers(MAX_PATCH, 30)), st.integers(1, 5))
def test_batches_of_windows_too(documents: list[Patched], limits: tuple[int, int], rows: int) -> None:
    """Which have context that is no target."""
    windows = list(document_windows(naive_row_group(documents), *limits))
    for first in range(0, len(windows), rows):
        chosen = windows[first : first + rows]
        assert as_lists(make_batch(chosen, with_patches=True).to(CPU)) == plain_batch([unpacked(one) for one in chosen])


def test_every_byte_value_has_an_id_of_its_own() -> None:
    """Bytes from 252 on become ids that need more than a byte, and zeros are no padding."""
    sequences = [whole(naive_row_group([patched(text, [True])])) for text in (bytes(range(256)), bytes(3))]
    batch = make_batch(sequences, with_patches=False)
    assert batch.byte_ids_BT[0].tolist() == [1, *range(4, 260)]
    assert batch.byte_ids_BT[1, :6].tolist() == [1, 4, 4, 4, 2, 0]
    assert batch.byte_ids_BT.dtype == torch.int16  # small on the host, int64 on the device


@pytest.mark.parametrize("limits", [(2, MAX_PATCH), (4, 9), (12, 20), (40, 200)])
@pytest.mark.parametrize("lengths", [[0], [1, 0, 0, 30, 2], [40, 17, 3]])
def test_the_model_takes_every_batch_and_padding_weighs_nothing(
    blt: BLT, lengths: list[int], limits: tuple[int, int]
) -> None:
    group = naive_row_group([random_document(seed, length) for seed, length in enumerate(lengths)])
    sequences = list(cut_sequences(group, *limits))[-6:]
    batch = make_batch(sequences, with_patches=True).to(CPU)
    assert batch.patch_lengths_BP is not None
    length = batch.byte_ids_BT.shape[1]
    assert length <= limits[1]
    assert batch.patch_lengths_BP.sum(1).tolist() == [length + 1] * len(batch.byte_ids_BT)
    with torch.no_grad():
        nats, targets, num_bytes = tally_batch(blt, batch)
        alone = [tally_batch(blt, make_batch([sequence], with_patches=True).to(CPU)) for sequence in sequences]
    assert int(targets) == sum(int(part[1]) for part in alone)
    assert int(num_bytes) == sum(int(part[2]) for part in alone)
    assert float(nats) == pytest.approx(sum(float(part[0]) for part in alone), rel=1e-12)


@pytest.mark.parametrize("with_patches", [True, False])
def test_packed_documents_cost_what_each_costs_alone(blt: BLT, entropy_model: EntropyModel, with_patches: bool) -> None:
    def nats_of(documents: list[Patched]) -> float:
        sequence = whole(naive_row_group(documents))
        with torch.no_grad():
            model = blt if with_patches else entropy_model
            return float(tally_batch(model, make_batch([sequence], with_patches).to(CPU))[0])

    documents = [random_document(seed, length) for seed, length in enumerate([5, 0, 31, 1, 12])]
    assert nats_of(documents) == pytest.approx(sum(nats_of([document]) for document in documents), rel=1e-12)


@pytest.mark.parametrize("with_patches", [True, False])
def test_an_empty_batch_is_one_row_that_weighs_nothing(
    blt: BLT, entropy_model: EntropyModel, with_patches: bool
) -> None:
    batch = make_batch([], with_patches).to(CPU)
    nats, targets, num_bytes = tally_batch(blt if with_patches else entropy_model, batch)
    assert [float(nats.detach()), int(targets), int(num_bytes)] == [0.0, 0, 0]
    nats.backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in blt.parameters())


def test_document_ids_are_contiguous_and_padding_is_minus_one() -> None:
    short, long = (
        naive_row_group([patched(b"ab", [True])]),
        naive_row_group([random_document(1, 5), random_document(2, 3)]),
    )
    batch = make_batch([whole(short), whole(long)], with_patches=True).to(CPU)
    assert batch.document_ids_BT.tolist() == [[0] * 4 + [-1] * 7, [0] * 7 + [1] * 4]
    assert (batch.targets_BT[0, 3:] == NO_TARGET).all()
    assert batch.targets_BT[1, 6] == NO_TARGET  # the BOS after an EOS


def test_context_is_read_but_not_scored(blt: BLT) -> None:
    """Two windows over one document: the second's targets begin where the first's end."""
    group = naive_row_group([random_document(3, 40)])
    windows = list(document_windows(group, 8, 20))
    assert len(windows) > 2
    found = []
    for window in windows:
        targets = make_batch([window], with_patches=True).to(CPU).targets_BT[0]
        scored_places = torch.nonzero(targets != NO_TARGET).flatten()
        assert scored_places.tolist() == list(range(max(window.context, 1) - 1, len(window) - 1))
        found += targets[scored_places].tolist()
    assert found == random_document(3, 40).ids[1:]
