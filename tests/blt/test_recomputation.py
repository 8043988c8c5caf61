"""Compiled blocks, and blocks that compute parts again: the loss and gradients of plain ones."""

import pytest
import torch
from torch import Tensor, nn

from blt.model import BLT
from blt.recomputation import Recomputation, compile_blocks, prepare_blocks
from blt.step import StepCounts, accumulate
from tests.blt.test_step import rows_of
from tests.model_cases import blt_config, randomised


def outcome(model: nn.Module) -> tuple[float, list[Tensor]]:
    """Loss and gradients of two micro-batches of other shapes."""
    counts = StepCounts(torch.device("cpu"))
    accumulate(model, counts, rows_of("blt", 0)[:2])
    return counts.totals().nats, [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("recomputation", ["none", "selective", "full"])
def test_compiled_blocks_make_the_same_gradients(recomputation: Recomputation) -> None:
    plain, compiled = (randomised(BLT(blt_config())) for _ in range(2))
    prepare_blocks(compiled, recomputation, compile=True)
    expected, found = outcome(plain), outcome(compiled)
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert len(found[1]) == len(expected[1])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-5)


def test_without_a_compiler_a_run_goes_on_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(function: object) -> object:
        raise RuntimeError("\nno C++ compiler is there\nand more")

    monkeypatch.setattr(torch, "compile", refuse)
    model = randomised(BLT(blt_config()))
    assert not compile_blocks(model)
    assert "going on without it: no C++ compiler is there" in caplog.text
    assert outcome(model)[0] == outcome(randomised(BLT(blt_config())))[0]
