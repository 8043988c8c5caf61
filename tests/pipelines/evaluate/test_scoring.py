"""Scoring: the nats of each document equal those of a pass over the document alone, in batches of any size."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from torch.nn import functional as F

from blt.entropy_model import document_entropies, document_nats
from blt.model import BLT
from blt.vocabulary import BOS, BYTE_OFFSET, EOS, encode
from pipelines.evaluate.scoring import (
    document_lengths,
    document_one_byte_patches,
    document_patches,
    score_documents,
)
from tests.model_cases import blt_config, randomised
from tests.pipelines.train.patched import Patched, naive_row_group, patched, patched_documents, random_document
from tests.small_language_model import small_language_model

DOCUMENTS = [random_document(seed, length) for seed, length in enumerate([0, 1, 50, 7, 200, 0, 33])]


@pytest.fixture(scope="module")
def blt() -> BLT:
    return randomised(BLT(blt_config())).double().eval()


def logits_alone(model: BLT, document: Patched) -> torch.Tensor:
    """One pass over the whole document, its patches as the document says: [n + 1, V]."""
    ids = torch.tensor(document.ids)
    places = [place for place, start in enumerate([True, *document.starts]) if start]
    lengths = torch.tensor(np.diff([*places, len(ids)]))
    with torch.no_grad():
        logits: torch.Tensor = model(ids[None, :-1], lengths[None], torch.zeros_like(ids)[None, :-1])[0]
    return logits


def nats_alone(model: BLT, document: Patched) -> float:
    return float(F.cross_entropy(logits_alone(model, document), torch.tensor(document.ids[1:]), reduction="sum"))


def hits_alone(model: BLT, document: Patched) -> int:
    """Byte by byte: is the likeliest next id the byte that comes?"""
    likeliest = logits_alone(model, document)[:-1].argmax(-1).tolist()
    return sum(found == byte + BYTE_OFFSET for found, byte in zip(likeliest, document.text, strict=True))


@pytest.mark.parametrize("batch_bytes", [1, 100, 10_000])
def test_documents_that_fit_a_window_cost_what_one_pass_costs(blt: BLT, batch_bytes: int) -> None:
    group = naive_row_group(DOCUMENTS)
    found = score_documents(blt, group, sequence_patches=500, sequence_bytes=500, batch_bytes=batch_bytes)
    assert found.nats.tolist() == pytest.approx([nats_alone(blt, document) for document in DOCUMENTS], rel=1e-12)


def test_hits_are_bytes_that_were_the_likeliest(blt: BLT) -> None:
    """Texts of few bytes, one of them the likeliest after BOS, so that a model of random weights hits some."""
    likeliest = int(logits_alone(blt, patched(b"", [True]))[0, BYTE_OFFSET:].argmax())
    texts = [bytes([likeliest]) * 30, random_document(3, 40).text, b""]
    for _ in range(30):  # the model's own greedy text
        own = patched(texts[2], [True])
        texts[2] += bytes([int(logits_alone(blt, own)[-1, BYTE_OFFSET:].argmax())])
    documents = [patched(text, [True]) for text in texts]
    found = score_documents(blt, naive_row_group(documents), sequence_patches=500, sequence_bytes=500, batch_bytes=100)
    assert found.hits.tolist() == [hits_alone(blt, document) for document in documents]
    assert found.hits[2] > 20


def test_longer_documents_are_read_in_windows_with_context(blt: BLT) -> None:
    """A patch per byte and windows of 32: each begins 16 bytes before what it scores, and the byte that opens it."""
    document = patched(random_document(5, 100).text, [True])
    found = score_documents(blt, naive_row_group([document]), sequence_patches=100, sequence_bytes=32, batch_bytes=100)
    expected = 0.0
    # Windows (first id read, first id scored, end): [0, 32) reads BOS and 31 bytes, then 16 more bytes each time.
    windows = [(0, 1, 32)]
    while windows[-1][2] < 102:
        scored = windows[-1][2]
        windows.append((scored - 17, scored, min(scored + 16, 102)))
    for first, scored, end in windows:
        ids = torch.tensor(document.ids[first:end])
        with torch.no_grad():
            logits = blt(
                ids[None, :-1], torch.ones(1, len(ids), dtype=torch.int64), torch.zeros(1, len(ids) - 1).long()
            )[0]
        expected += float(F.cross_entropy(logits, ids[1:], reduction="none")[scored - first - 1 :].sum())
    assert found.nats.tolist() == pytest.approx([expected], rel=1e-12)


@pytest.mark.parametrize("limits", [(2, 6), (5, 9), (40, 40)])
def test_batches_change_nothing(blt: BLT, limits: tuple[int, int]) -> None:
    group = naive_row_group(DOCUMENTS)
    found = [
        score_documents(blt, group, sequence_patches=limits[0], sequence_bytes=limits[1], batch_bytes=size)
        for size in (1, 64, 10_000)
    ]
    for other in found[1:]:
        assert other.nats.tolist() == pytest.approx(found[0].nats.tolist(), rel=1e-12)
        assert other.hits.tolist() == found[0].hits.tolist()


def test_documents_of_a_row_group() -> None:
    group = naive_row_group(DOCUMENTS)
    assert document_lengths(group).tolist() == [len(document.text) for document in DOCUMENTS]
    assert document_patches(group).tolist() == [document.num_patches for document in DOCUMENTS]
    assert document_one_byte_patches(group).tolist() == [_one_byte_patches(document) for document in DOCUMENTS]
    nothing = naive_row_group([])
    for count in (document_lengths, document_patches, document_one_byte_patches):
        assert count(nothing).tolist() == []


@given(patched_documents())
def test_one_byte_patches_do_not_hold_the_eos(documents: list[Patched]) -> None:
    found = document_one_byte_patches(naive_row_group(documents))
    assert found.tolist() == [_one_byte_patches(document) for document in documents]


def _one_byte_patches(document: Patched) -> int:
    places = [place for place, start in enumerate(document.starts[:-1]) if start]
    return sum(after - before == 1 for before, after in itertools.pairwise([*places, len(document.text)]))


@pytest.mark.parametrize("reset_on_newline", [False, True])
def test_nats_of_the_entropy_model_are_of_the_distributions_of_its_entropies(reset_on_newline: bool) -> None:
    model = small_language_model().entropy_model
    assert model is not None
    texts = [b"", b"a", b"one\n\ntwo\nthree", bytes(range(256)) * 2, b"\n"]
    nats = document_nats(model, texts, reset_on_newline=reset_on_newline)
    entropies = document_entropies(model, texts, reset_on_newline=reset_on_newline)
    for text, found, entropy in zip(texts, nats, entropies, strict=True):
        ids = torch.cat((torch.tensor([BOS]), encode(text), torch.tensor([EOS])))
        opens = (ids[:-1] == encode(b"\n")) if reset_on_newline else torch.zeros(len(text) + 1, dtype=torch.bool)
        with torch.no_grad():
            probabilities = model(ids[None, :-1], opens.long().cumsum(0)[None])[0].log_softmax(-1)
        assert torch.allclose(found, -probabilities.gather(1, ids[1:, None])[:, 0], atol=1e-4)
        assert torch.allclose(entropy, -(probabilities.exp() * probabilities).sum(-1), atol=1e-4)
    for row_bytes in (1, 7, 100):
        again = document_nats(model, texts, reset_on_newline=reset_on_newline, row_bytes=row_bytes)
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(again, nats, strict=True))
