"""Steps recorded as CUDA graphs, held to those on CPU: `pytest -m gpu tests/blt/test_recorded_steps_cuda.py`.

In float64, so that only the order of sums differs, and the last digit of rotary angles, which are float32.
"""

import pytest
import torch

from blt.entropy_model import document_entropies
from blt.generation import generate
from blt.patching import PatchRule, starts_to_lengths
from blt.recorded_steps import RecordedBLT, RecordedEntropies, online_blt, online_entropies
from blt.vocabulary import BOS, encode
from tests.blt.test_online_blt import documents_with_starts, language_model
from tests.model_cases import blt_config

DEVICE = "cuda"
CLOSE = 1e-6

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("rate", [0.02, 0.3])
def test_logits_are_those_of_a_forward(rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the window, with room for so little that what is recorded is recorded again; documents that end."""
    monkeypatch.setattr("blt.recorded_steps.FIRST_COLUMNS", 16)
    monkeypatch.setattr("blt.recorded_steps.FIRST_PATCH_BYTES", 8)
    lm = language_model(blt_config(), PatchRule(threshold=4.0))
    opened, num_steps = [1, 9, 30], 60
    ids, starts = documents_with_starts(3, len(opened), max(opened) + num_steps, rate)
    model = lm.model.double()
    with torch.inference_mode():
        expected = model(ids, starts_to_lengths(starts))
        online = online_blt(model.to(DEVICE), len(opened))
        assert isinstance(online, RecordedBLT)
        for row, length in enumerate(opened):
            found = online.open(row, ids[row, :length], starts[row, : length + 1])
            torch.testing.assert_close(found.cpu(), expected[row, length - 1], rtol=CLOSE, atol=CLOSE)
        rows = [0, 1, 2]
        for step in range(num_steps):
            if step == num_steps // 2:
                online.keep([2, 0])
                rows = [2, 0]
            places = [opened[row] + step for row in rows]
            found = online.step(
                [int(ids[row, place]) for row, place in zip(rows, places, strict=True)],
                [bool(starts[row, place + 1]) for row, place in zip(rows, places, strict=True)],
            )
            torch.testing.assert_close(found.cpu(), expected[rows, places], rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize("reset", [False, True])
def test_entropies_are_those_of_the_documents(reset: bool) -> None:
    lm = language_model(blt_config(), PatchRule(threshold=4.0))
    assert lm.entropy_model is not None
    model, document = lm.entropy_model.double(), b"some lines\nof text, \n\nlonger than a window\n" * 3
    (expected,) = document_entropies(model, [document], reset_on_newline=reset)
    ids = torch.cat((torch.tensor([BOS]), encode(document)))
    with torch.inference_mode():
        online = online_entropies(model.to(DEVICE), reset, 1)
        assert isinstance(online, RecordedEntropies)
        found = [online.open(0, ids[:50]), *(online.step([int(byte_id)]) for byte_id in ids[50:])]
    torch.testing.assert_close(torch.cat(found), expected, rtol=0, atol=1e-6)  # handed out as float32


def test_continuations_are_those_on_cpu() -> None:
    """Greedy, several prompts at once of which some end before the others do."""
    lm = language_model(blt_config(), PatchRule(threshold=4.0, max_patch_length=6))
    assert lm.entropy_model is not None
    lm.model.double()
    lm.entropy_model.double()
    prompts = [b"", b"one", b"another prompt", bytes(range(200))]
    whole = generate(lm, prompts, max_new_bytes=60)
    stops = [whole[1][20:23], whole[3][40:43]]
    expected = generate(lm, prompts, max_new_bytes=60, stop=stops)
    assert len({len(found) for found in expected}) > 1
    lm.model.to(DEVICE)
    lm.entropy_model.to(DEVICE)
    assert generate(lm, prompts, max_new_bytes=60, stop=stops) == expected
