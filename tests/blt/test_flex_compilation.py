"""FlexAttention and the compiler: what is compiled anew and what is not, beside compiled blocks, and what happens where
it cannot be compiled.
"""

import functools
import logging
from collections.abc import Callable, Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from blt import flex_attention
from blt.attention import causal_spans
from blt.flex_attention import block_mask, compiled_attention
from blt.recomputation import Recomputation, prepare_blocks
from tests.blt.test_flex_attention import (
    FORWARD,
    HEAD_WIDTH,
    HEADS,
    assert_same_outcome,
    documents_of,
    inputs,
    outcome,
    rotated_bands,
    small_blt,
    small_entropy_model,
    turns_of,
)
from tests.flex_forced import flex_forced, gradients_on_cpu


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """torch.compile that reads and guards functions as ever and runs what it read as it stands; counts what it reads.

    CUDA needs a GPU, and torch's compiler has no gradients of FlexAttention for the CPU.
    """
    graphs: list[int] = []

    def backend(module: torch.fx.GraphModule, examples: object) -> Callable[..., object]:
        graphs.append(len(module.graph.nodes))
        return module.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    monkeypatch.setattr(flex_attention, "_both_passes", backend)
    monkeypatch.setattr(flex_attention, "_refused", set())
    flex_attention._compiled.cache_clear()
    torch.compiler.reset()
    with gradients_on_cpu():
        yield graphs
    flex_attention._compiled.cache_clear()
    torch.compiler.reset()


def compiled_case(rows: int, length: int, kv_heads: int = 2, carried: int = 0, window: int | None = 64) -> bool:
    """Whether a batch is compiled; if so, it is right."""
    spans = causal_spans(documents_of(length)[:1].expand(rows, -1), window, carried)
    qkv = inputs(rows, length, carried, kv_heads, torch.float32)
    found = compiled_attention(*qkv, turns_of(length, carried), block_mask(spans))
    if found is not None:
        torch.testing.assert_close(found, rotated_bands(*qkv, spans), rtol=0, atol=FORWARD[torch.float32])
    return found is not None


def test_lengths_and_windows_share_a_compiled_function(compiler: list[int]) -> None:
    """Once sizes and documents have changed for the first time, no other does it again: masks are arguments of it."""
    assert compiled_case(2, 300)
    assert compiled_case(3, 700)
    seen = len(compiler)
    for rows, length, window in ((5, 513, 64), (2, 450, None), (4, 1000, 7)):
        assert compiled_case(rows, length, window=window)
    assert compiled_case(2, 400, carried=100)
    assert compiled_case(2, 400, carried=63)
    assert len(compiler) <= seen + 1  # as many keys as queries, or more


@pytest.mark.slow
def test_a_process_may_compile_many_variants(compiler: list[int]) -> None:
    """More than torch's default limit of 8, at which it would take the eager operator, which builds all scores."""
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            for rows, length, kv_heads in ((1, 1, 4), (1, 100, 4), (1, 300, 2), (2, 100, 1), (2, 300, 4)):
                assert compiled_case(rows, length, kv_heads)
    assert len(compiler) > 8
    assert not flex_attention._refused


def test_past_the_limit_attention_goes_on_in_bands(
    compiler: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(flex_attention, "RECOMPILE_LIMIT", 1)
    assert compiled_case(2, 300)
    assert not compiled_case(2, 300, kv_heads=1)
    assert not compiled_case(2, 200, kv_heads=1)
    assert compiled_case(2, 300)
    assert [record.getMessage() for record in caplog.records if record.name == "blt.flex_attention"] == [
        f"FlexAttention cannot be compiled for {(torch.float32, HEADS, 1, HEAD_WIDTH, True)}, going on in bands"
    ]


class PassThrough(TorchDispatchMode):
    """A mode that changes nothing; torch.compile leaves functions alone under it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return func(*args, **(kwargs or {}))


def test_a_compiler_that_leaves_it_alone_is_not_taken_for_one(
    compiler: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    """The function as it stands would build all scores."""
    with PassThrough():
        assert not compiled_case(2, 300)
    assert "torch.compile is switched off here" in caplog.text
    assert not compiler


def test_without_kernels_models_go_on_in_bands(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The real compiler, which has no gradients of FlexAttention on CPU: refused once, right all the same."""
    model = small_entropy_model()
    expected = outcome(model)
    monkeypatch.setattr("blt.layers.flex_fits", lambda q: True)
    monkeypatch.setattr("blt.layers.flex_causal_attention", compiled_attention)
    monkeypatch.setattr(flex_attention, "_refused", set())
    caplog.set_level(logging.WARNING)
    with gradients_on_cpu():
        found = outcome(model)
    assert_same_outcome(found, expected)
    assert len([record for record in caplog.records if record.name == "blt.flex_attention"]) == 1


@pytest.mark.parametrize("recomputation", [pytest.param("none", marks=pytest.mark.slow), "selective"])
def test_compiled_blocks_leave_its_compilation_to_itself(compiler: list[int], recomputation: Recomputation) -> None:
    """Blocks are compiled all but their attention; FlexAttention inside it is compiled nevertheless."""
    model = small_blt()
    expected = outcome(model)
    prepare_blocks(model, recomputation, compile=True)
    with flex_forced() as used, pytest.MonkeyPatch.context() as patched:
        patched.setattr("blt.layers.flex_causal_attention", compiled_attention)
        found = outcome(model)
    assert not used
    calls = flex_attention._compiled.cache_info()
    assert calls.hits + calls.misses == (5 if recomputation == "none" else 2 * 5)
    assert not flex_attention._refused
    assert_same_outcome(found, expected)
