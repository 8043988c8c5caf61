"""A step: however its batch is cut, over micro-batches or ranks, the same weights come out.

Float64 throughout, so that what is seen is the order of sums alone; AdamW divides by the root of the gradient's square,
which leaves about 1e-10 of it. Adding up means of micro-batches instead of sums would show at 1e-2.
"""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from blt.entropy_model import EntropyModel, EntropyModelConfig
from blt.loss import NO_TARGET
from blt.model import BLT
from blt.optim import OptimizerConfig, build_optimizer
from blt.parallel import FlatGradients
from blt.step import Batch, StepResult, tally_batch, train_step
from blt.vocabulary import EOS
from tests.gloo import run_ranks
from tests.model_cases import blt_config, packed_batch, randomised, transformer_config

KINDS = ["blt", "entropy_model"]
ROWS = [[9, 20, 4], [31], [2, 3], [17, 1, 11], [5]]
"""Bytes of the documents of each row: few enough in some rows that a mean of means would be another number."""
STEPS = 3


def new_model(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(1)
    model = BLT(blt_config()) if kind == "blt" else EntropyModel(EntropyModelConfig(transformer=transformer_config()))
    return randomised(model.to(dtype))


def rows_of(kind: str, seed: int) -> list[Batch]:
    """Micro-batches of one row each; a target is an EOS now and then."""
    packed = packed_batch(ROWS, seed=seed, padding=2)
    targets = packed.targets.clone()
    targets[(torch.arange(targets.numel()).view_as(targets) % 6 == 0) & (targets != NO_TARGET)] = EOS
    assert packed.document_ids is not None
    return [
        Batch(
            byte_ids_BT=packed.byte_ids[row : row + 1].to(torch.int16),
            targets_BT=targets[row : row + 1].to(torch.int16),
            document_ids_BT=packed.document_ids[row : row + 1].to(torch.int32),
            patch_lengths_BP=packed.patch_lengths[row : row + 1].to(torch.int32) if kind == "blt" else None,
        )
        for row in range(len(ROWS))
    ]


def joined(rows: Sequence[Batch]) -> Batch:
    with_patches = rows[0].patch_lengths_BP is not None
    return Batch(
        byte_ids_BT=torch.cat([row.byte_ids_BT for row in rows]),
        targets_BT=torch.cat([row.targets_BT for row in rows]),
        document_ids_BT=torch.cat([row.document_ids_BT for row in rows]),
        patch_lengths_BP=torch.cat([row.patch_lengths_BP for row in rows if row.patch_lengths_BP is not None])
        if with_patches
        else None,
    )


def padding_batch(kind: str) -> Batch:
    """One row that weighs nothing, as a rank gets where slots run out."""
    return Batch(
        byte_ids_BT=torch.zeros(1, 1, dtype=torch.int16),
        targets_BT=torch.full((1, 1), NO_TARGET, dtype=torch.int16),
        document_ids_BT=torch.full((1, 1), -1, dtype=torch.int32),
        patch_lengths_BP=torch.tensor([[1, 1]], dtype=torch.int32) if kind == "blt" else None,
    )


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def trained(kind: str, steps: Sequence[Sequence[Batch]]) -> tuple[dict[str, Tensor], list[StepResult]]:
    """Weights and results after the given micro-batches of each step, clipped at less than the gradient's norm."""
    model = new_model(kind)
    optimizer = build_optimizer(model, OptimizerConfig(lr=1e-2))
    gradients = FlatGradients(model.parameters())
    results = [train_step(model, optimizer, gradients, batches, clip_norm=0.5) for batches in steps]
    return weights_of(model), results


def of_rank(rows: list[Batch], rank: int, world_size: int, kind: str) -> list[Batch]:
    """Every world_size-th row from `rank`, and padding until all ranks have as many."""
    own, most = rows[rank::world_size], -(-len(rows) // world_size)
    return own + [padding_batch(kind)] * (most - len(own))


def assert_same(
    got: tuple[dict[str, Tensor], list[StepResult]], wanted: tuple[dict[str, Tensor], list[StepResult]]
) -> None:
    for ours, theirs in zip(got[1], wanted[1], strict=True):
        assert (ours.tally.targets, ours.tally.bytes) == (theirs.tally.targets, theirs.tally.bytes)
        assert ours.tally.nats == pytest.approx(theirs.tally.nats, rel=1e-10)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-10)
    for name, weight in wanted[0].items():
        torch.testing.assert_close(got[0][name], weight, rtol=1e-8, atol=1e-8, msg=name)


@pytest.fixture(scope="module", params=KINDS)
def whole(request: pytest.FixtureRequest) -> tuple[str, tuple[dict[str, Tensor], list[StepResult]]]:
    """Kind of the model, and what steps on whole batches made of it."""
    return request.param, trained(request.param, [[joined(rows_of(request.param, step))] for step in range(STEPS)])


def test_accumulated_gradients_equal_the_whole_batch(
    whole: tuple[str, tuple[dict[str, Tensor], list[StepResult]]],
) -> None:
    kind, wanted = whole
    assert all(result.grad_norm > 0.5 for result in wanted[1])
    assert_same(trained(kind, [rows_of(kind, step) for step in range(STEPS)]), wanted)
    uneven = [[joined(rows_of(kind, step)[:3]), joined(rows_of(kind, step)[3:])] for step in range(STEPS)]
    assert_same(trained(kind, uneven), wanted)


def test_padding_weighs_nothing(whole: tuple[str, tuple[dict[str, Tensor], list[StepResult]]]) -> None:
    kind, wanted = whole
    steps = [[padding_batch(kind), *rows_of(kind, step), padding_batch(kind)] for step in range(STEPS)]
    assert_same(trained(kind, steps), wanted)


def test_ranks_equal_the_whole_batch(
    two_ranks: dict[str, list[tuple[dict[str, Tensor], list[StepResult]]]],
    whole: tuple[str, tuple[dict[str, Tensor], list[StepResult]]],
) -> None:
    """Five rows over two ranks: the second pads its last micro-batch. Both ranks hold the same bits afterwards."""
    kind, wanted = whole
    first, second = two_ranks[kind]
    assert_same(first, wanted)
    assert first[1] == second[1]
    assert all(torch.equal(first[0][name], second[0][name]) for name in first[0])


def test_all_ranks_stop_where_one_sees_no_finite_loss(two_ranks: dict[str, list[bool]]) -> None:
    assert two_ranks["stopped"] == [True, True]


@pytest.fixture(scope="module")
def two_ranks() -> dict[str, list[object]]:
    """What two gloo processes made, by case and rank."""
    made = run_ranks(2, steps_of_rank)
    return {case: [of_one[case] for of_one in made] for case in made[0]}


def steps_of_rank() -> dict[str, object]:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    made: dict[str, object] = {
        kind: trained(kind, [of_rank(rows_of(kind, step), rank, world_size, kind) for step in range(STEPS)])
        for kind in KINDS
    }
    return made | {"stopped": stops_on(broken_loss=rank == 1)}


def stops_on(*, broken_loss: bool) -> bool:
    """Whether a step raises FloatingPointError and leaves weights and optimiser as they were."""
    model = new_model("entropy_model", torch.float32)
    optimizer = build_optimizer(model, OptimizerConfig())
    if broken_loss:
        with torch.no_grad():
            model.get_parameter("output.weight").mul_(1e38)
    before = weights_of(model)
    try:
        train_step(model, optimizer, FlatGradients(model.parameters()), rows_of("entropy_model", 0), clip_norm=1.0)
    except FloatingPointError:
        return not optimizer.state and all(torch.equal(before[name], now) for name, now in weights_of(model).items())
    return False


def test_a_loss_that_is_not_finite_leaves_the_weights_alone() -> None:
    assert stops_on(broken_loss=True)
    assert not stops_on(broken_loss=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_leaves_the_weights_alone(value: float) -> None:
    """The loss itself is finite."""
    model = new_model("blt")
    optimizer = build_optimizer(model, OptimizerConfig())
    before = weights_of(model)
    gradients = FlatGradients(model.parameters())
    handle = model.get_parameter("latent.projection.weight").register_hook(lambda grad: torch.full_like(grad, value))
    with pytest.raises(FloatingPointError, match=r"gradient \(norm (nan|inf)\)"):
        train_step(model, optimizer, gradients, rows_of("blt", 0), clip_norm=1.0)
    assert not optimizer.state
    assert all(torch.equal(before[name], now) for name, now in weights_of(model).items())
    handle.remove()
    train_step(model, optimizer, gradients, rows_of("blt", 0), clip_norm=1.0)
    assert all(bool(now.isfinite().all()) for now in weights_of(model).values())


@pytest.mark.parametrize("share", [None, 0.25, 4.0], ids=["no clipping", "clipped", "below the limit"])
def test_clipping(share: float | None) -> None:
    """With plain descent at rate 1 a step is the gradient of the mean loss, scaled down to the limit and never up.

    The limit is a share of the gradient's norm, which is reported as it was before.
    """
    model = new_model("blt")
    rows = rows_of("blt", 0)
    nats, targets, _ = tally_batch(model, joined(rows).to(torch.device("cpu")))
    mean_gradients = torch.autograd.grad(nats / targets, list(model.parameters()))
    norm = float(torch.cat([gradient.flatten() for gradient in mean_gradients]).norm())
    before = weights_of(model)
    result = train_step(
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        FlatGradients(model.parameters()),
        rows,
        clip_norm=None if share is None else share * norm,
    )
    assert result.grad_norm == pytest.approx(norm, rel=1e-6)
    scale = 1.0 if share is None else min(share, 1.0)
    for (name, now), gradient in zip(weights_of(model).items(), mean_gradients, strict=True):
        torch.testing.assert_close(before[name] - now, scale * gradient, rtol=1e-6, atol=1e-9, msg=name)


def test_a_step_counts_targets_and_bytes() -> None:
    """A byte of a document and an EOS are targets; EOS and what has no target are no bytes."""
    rows = rows_of("blt", 0)
    targets = torch.cat([row.targets_BT for row in rows])
    model = new_model("blt")
    optimizer = build_optimizer(model, OptimizerConfig())
    tally = train_step(model, optimizer, FlatGradients(model.parameters()), rows, clip_norm=None).tally
    assert tally.targets == sum(map(sum, ROWS)) == int((targets != NO_TARGET).sum())
    assert tally.targets - tally.bytes == int((targets == EOS).sum()) > 0


def test_a_step_of_padding_alone_has_no_loss() -> None:
    model = new_model("blt")
    optimizer = build_optimizer(model, OptimizerConfig())
    result = train_step(model, optimizer, FlatGradients(model.parameters()), [padding_batch("blt")], clip_norm=1.0)
    assert (result.tally.nats, result.tally.targets, result.tally.bytes, result.grad_norm) == (0.0, 0, 0, 0.0)


def test_gradients_stay_in_one_buffer() -> None:
    """A step is one all-reduce only as long as backward passes add into the buffer."""
    model = new_model("blt")
    gradients = FlatGradients(model.parameters())
    train_step(model, build_optimizer(model, OptimizerConfig()), gradients, rows_of("blt", 0), clip_norm=1.0)
    grads = [parameter.grad for parameter in model.parameters()]
    assert all(grad is not None and grad._base is gradients.buffer for grad in grads)
    flat = torch.cat([grad.flatten() for grad in grads if grad is not None])
    assert torch.equal(flat, gradients.buffer)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_products_keep_float32_weights(kind: str) -> None:
    """8 bits of mantissa: the loss of random weights moves by less than 1 %, and steps go down as in float32."""
    losses: dict[torch.dtype | None, list[float]] = {}
    for autocast in (None, torch.bfloat16):
        model = new_model(kind, torch.float32)
        optimizer = build_optimizer(model, OptimizerConfig(lr=1e-2))
        gradients = FlatGradients(model.parameters())
        rows = rows_of(kind, 0)
        results = [
            train_step(model, optimizer, gradients, rows, clip_norm=1.0, autocast=autocast).tally for _ in range(5)
        ]
        losses[autocast] = [tally.nats / tally.targets for tally in results]
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
        assert gradients.buffer.dtype == torch.float32
    assert losses[torch.bfloat16] != losses[None]
    assert losses[torch.bfloat16][0] == pytest.approx(losses[None][0], rel=0.01)
    assert losses[torch.bfloat16][-1] < losses[torch.bfloat16][0]


def test_batches_travel_as_small_integers_and_arrive_as_int64() -> None:
    moved = rows_of("blt", 0)[0].to(torch.device("cpu"))
    assert moved.patch_lengths_BP is not None
    fields = (moved.byte_ids_BT, moved.targets_BT, moved.document_ids_BT, moved.patch_lengths_BP)
    assert all(tensor.dtype == torch.int64 for tensor in fields)
    assert replace(rows_of("blt", 0)[0], patch_lengths_BP=None).to(torch.device("cpu")).patch_lengths_BP is None
