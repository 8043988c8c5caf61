"""What must hold of the whole model whatever its shape: causality, isolation of documents, edge documents, initial
weights, bfloat16, and the inputs and configurations that are refused.
"""

import re
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blt.entropy_model import EntropyModel, EntropyModelConfig, document_entropies
from blt.errors import ConfigError
from blt.layers import TransformerConfig
from blt.local_encoder import CrossAttentionConfig
from blt.loss import NO_TARGET, summed_cross_entropy
from blt.model import BLT, BLTConfig
from blt.patching import PatchRule, document_patch_starts
from blt.vocabulary import BOS, EOS, encode
from tests.model_cases import (
    blt_config,
    gradients,
    largest_difference,
    packed_batch,
    patch_lengths_of,
    plain_batch,
    randomised,
    transformer_config,
)

CONFIGS: dict[str, BLTConfig] = {
    "last encoder layer": blt_config(encoder={"layers": 2}),
    "all encoder layers, mean": blt_config(encoder={"layers": 2}, cross={"encoder_layers": "all", "pooling": "mean"}),
    "pooling alone, min": blt_config(cross={"encoder_layers": "none", "slots": 1, "pooling": "min"}),
    "first decoder layer, k 4": blt_config(cross={"decoder_layers": "first", "slots": 4}),
    "no decoder cross-attention": blt_config(cross={"decoder_layers": "none"}),
    "latent as wide as local": blt_config(latent={"width": 16}, cross={"slots": 1}),
    "no window, no hashes": blt_config(encoder={"window": None}, decoder={"window": None}, hashes={"group_sizes": ()}),
}


def model_of(name: str, dtype: torch.dtype = torch.float64) -> BLT:
    return randomised(BLT(CONFIGS[name]), seed=1).to(dtype)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("isolate", [True, False])
@torch.no_grad()
def test_a_byte_changes_no_logit_before_it(name: str, isolate: bool) -> None:
    """Row i holds another byte at i, patch lengths held fixed: logits before i stay, the logit at i moves."""
    model = model_of(name)
    batch = packed_batch([[23, 1, 16]], seed=2) if isolate else plain_batch(1, 40, seed=2, first_id=4)
    length = batch.byte_ids.shape[1]
    changed = batch.byte_ids.repeat(length, 1)
    place = torch.arange(length)
    changed[place, place] = (changed[place, place] + 97) % 260
    lengths = batch.patch_lengths.repeat(length, 1)
    documents = None if batch.document_ids is None else batch.document_ids.repeat(length, 1)
    before = model(batch.byte_ids, batch.patch_lengths, batch.document_ids)
    difference = (model(changed, lengths, documents) - before).abs().amax(-1)
    assert float(difference.tril(-1).max()) < 1e-12
    assert float(difference.diagonal().min()) > 1e-6


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_later_patch_borders_change_no_logit(name: str) -> None:
    """A logit at i depends on the starts up to i + 1 alone (that one, byte i itself decides)."""
    model, length = model_of(name), 40
    generator = torch.Generator().manual_seed(0)
    byte_ids = plain_batch(1, length, seed=3).byte_ids
    starts = torch.rand(length, length + 1, generator=generator) < 0.3
    base = torch.rand(1, length + 1, generator=generator) < 0.3
    base[:, :2] = True
    rows = torch.where(torch.arange(length + 1) <= torch.arange(length)[:, None] + 1, base, starts)
    before = model(byte_ids, patch_lengths_of(base.tolist()))
    after = model(byte_ids.repeat(length, 1), patch_lengths_of(rows.tolist()))
    assert float((after - before).abs().amax(-1).tril().max()) < 1e-12


class Document:
    """A document on its own: bytes (the last an EOS if asked), patch starts, targets."""

    def __init__(self, num_bytes: int, *, closed: bool, seed: int) -> None:
        one = plain_batch(1, num_bytes, seed=seed, first_id=4)
        self.byte_ids = one.byte_ids[0]
        if closed:
            self.byte_ids[-1] = EOS
        self.targets = one.targets[0]
        generator = torch.Generator().manual_seed(seed)
        self.starts = (torch.rand(num_bytes, generator=generator) < 0.3).tolist()
        self.starts[:2] = [True] * min(2, num_bytes)


DOCUMENTS = [Document(n, closed=n % 2 == 1, seed=n) for n in (30, 1, 2, 17, 9, 24)]
PACKINGS = {
    "one row": [[0, 1, 2, 3, 4, 5]],
    "one row in another order": [[5, 1, 3, 0, 2, 4]],
    "rows of unequal length": [[3, 0], [1], [4, 2, 5]],
    "with a row of padding": [[0, 1, 2], [], [3, 4, 5]],
}


def rows_of(packing: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Byte ids, patch lengths, document ids and targets of rows of documents, padded to the longest and one more."""
    length = 1 + max(sum(len(DOCUMENTS[d].byte_ids) for d in row) for row in packing)
    parts: list[list[Tensor]] = [[], [], []]
    starts = []
    for row in packing:
        documents = [DOCUMENTS[d] for d in row]
        padding = length - sum(len(document.byte_ids) for document in documents)
        columns = (
            [document.byte_ids for document in documents],
            [torch.full_like(document.byte_ids, d) for d, document in zip(row, documents, strict=True)],
            [document.targets for document in documents],
        )
        for part, column, fill in zip(parts, columns, (0, -1, NO_TARGET), strict=True):
            part.append(torch.cat([*column, torch.full((padding,), fill)]))
        starts.append([s for document in documents for s in document.starts] + [True] + [False] * padding)
        starts[-1][1] = True
    byte_ids, document_ids, targets = (torch.stack(part) for part in parts)
    return byte_ids, patch_lengths_of(starts), document_ids, targets


def alone(forward: Callable[[Document], Tensor], model: nn.Module) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients summed over the documents, each a row of its own without document ids."""
    loss = torch.stack([summed_cross_entropy(forward(d), d.targets[None]) for d in DOCUMENTS]).sum()
    return loss.item(), gradients(loss, model)


def assert_isolated(
    model: nn.Module, logits: Tensor, targets: Tensor, expected: tuple[float, dict[str, Tensor]]
) -> None:
    """Float64: 1e-9 of the loss and of each gradient's largest entry."""
    loss = summed_cross_entropy(logits, targets)
    assert loss.item() == pytest.approx(expected[0], rel=1e-9)
    assert (
        largest_difference(gradients(loss, model), expected[1], lambda tensor: tensor.abs().max().clamp(min=1)) < 1e-9
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_documents_are_isolated(name: str) -> None:
    """Loss and gradients of packed documents equal those of the documents alone, run as the reference runs them."""
    model = model_of(name)
    expected = alone(lambda d: model(d.byte_ids[None], patch_lengths_of([[*d.starts, True]])), model)
    for packing in PACKINGS.values():
        byte_ids, patch_lengths, document_ids, targets = rows_of(packing)
        assert_isolated(model, model(byte_ids, patch_lengths, document_ids), targets, expected)


def test_packed_documents_are_isolated_in_the_entropy_model() -> None:
    config = EntropyModelConfig(transformer=transformer_config(layers=2))
    model = randomised(EntropyModel(config), seed=1).double()
    expected = alone(lambda d: model(d.byte_ids[None]), model)
    for packing in PACKINGS.values():
        byte_ids, _, document_ids, targets = rows_of(packing)
        assert_isolated(model, model(byte_ids, document_ids), targets, expected)


EDGE_DOCUMENTS = {
    "empty": b"",
    "one byte": b"a",
    "two bytes": b"ab",
    "invalid UTF-8": b"\xff\xfe\x80\xc3(\xf0\x9f",
    "every byte": bytes(range(256)),
    "spaces": b" " * 30,
    "one letter": b"a" * 200,
    "newlines": b"\n" * 20,
}
RULES = {
    "entropy": PatchRule(threshold=4.0, max_patch_length=16),
    "all-boundary": PatchRule(threshold=-1.0),
    "no-boundary": PatchRule(threshold=1e9),
    "monotonic": PatchRule(threshold=0.1, monotonic=True),
    "both": PatchRule(threshold=1.0, threshold_add=0.1),
    "space": PatchRule(kind="space"),
    "byte": PatchRule(kind="byte"),
    "fixed": PatchRule(kind="fixed", patch_size=4),
    "top_k": PatchRule(kind="top_k", patch_size=4),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("document", EDGE_DOCUMENTS)
def test_edge_documents_go_through(rule: str, document: str) -> None:
    """Entropies, patch starts, model: lengths sum to the input and the next byte; gradients are finite."""
    text = EDGE_DOCUMENTS[document]
    entropy_model = randomised(EntropyModel(EntropyModelConfig(transformer=transformer_config())), seed=1)
    (entropies,) = document_entropies(entropy_model, [text])
    starts = [True, *document_patch_starts(text, entropies, RULES[rule]).tolist()]
    lengths = patch_lengths_of([starts])
    byte_ids = torch.cat((torch.tensor([BOS]), encode(text)))[None]
    assert int(lengths.sum()) == byte_ids.shape[1] + 1
    assert (lengths > 0).all()
    if rule == "all-boundary":
        assert (lengths == 1).all()
    if rule == "no-boundary":
        assert lengths.tolist() == [[1, len(text) + 1]]
    model = model_of("last encoder layer", torch.float32)
    logits = model(byte_ids, lengths, torch.zeros_like(byte_ids))
    assert logits.shape == (1, byte_ids.shape[1], 260)
    loss = summed_cross_entropy(logits, F.pad(byte_ids[:, 1:], (0, 1), value=EOS))
    assert all(torch.isfinite(grad).all() for grad in gradients(loss, model).values())


@pytest.mark.parametrize("name", CONFIGS)
def test_bfloat16_is_near_float32(name: str) -> None:
    """8 bits of mantissa through four layers and doubled residuals: a few per cent of the logits and gradients."""
    wide = model_of(name, torch.float32)
    narrow = model_of(name, torch.bfloat16)
    wide.load_state_dict({key: value.float() for key, value in narrow.state_dict().items()})
    batch = packed_batch([[30, 17], [20]], seed=4)
    found = narrow(batch.byte_ids, batch.patch_lengths, batch.document_ids)
    expected = wide(batch.byte_ids, batch.patch_lengths, batch.document_ids)
    inside = batch.document_ids >= 0 if batch.document_ids is not None else ...
    assert found.dtype == torch.float32
    assert ((found - expected)[inside].norm() / expected[inside].norm()).item() < 0.05
    ours = gradients(summed_cross_entropy(found, batch.targets), narrow)
    theirs = gradients(summed_cross_entropy(expected, batch.targets), wide)
    assert all(grad.dtype == torch.bfloat16 for grad in ours.values())
    ours_flat = torch.cat([grad.float().flatten() for grad in ours.values()])
    theirs_flat = torch.cat([grad.flatten() for grad in theirs.values()])
    assert float((ours_flat - theirs_flat).norm() / theirs_flat.norm()) < 0.1


def test_bfloat16_entropy_model_is_near_float32() -> None:
    config = EntropyModelConfig(transformer=transformer_config(layers=2))
    narrow = randomised(EntropyModel(config), seed=1).bfloat16()
    wide = EntropyModel(config)
    wide.load_state_dict({key: value.float() for key, value in narrow.state_dict().items()})
    (found,), (expected,) = (document_entropies(model, [b"some text " * 20]) for model in (narrow, wide))
    assert found.dtype == torch.float32
    assert float((found - expected).abs().max()) < 0.1


@pytest.mark.parametrize("init_scaling", ["disabled", "current_depth", "global_depth"])
def test_initial_weights(init_scaling: str) -> None:
    """Input width ** -0.5, cut at 3 std, divided by the layer's factor; norms 1."""
    shape: dict[str, object] = {"layers": 2, "init_scaling": init_scaling}
    config = blt_config(encoder=shape, latent=shape, decoder=shape, cross={"encoder_layers": "all"})
    torch.manual_seed(0)
    model = BLT(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert bool((parameter == 1).all()), name
            continue
        layer = re.search(r"(?:blocks|cross_attention)\.(\d+)\.", name)
        depth = {"disabled": 0.5, "current_depth": int(layer[1]) + 1 if layer else 0, "global_depth": 3}[init_scaling]
        factor = (2 * depth) ** 0.5 if layer else 1.0
        std = parameter.shape[-1] ** -0.5 / factor
        assert parameter.std().item() == pytest.approx(std, rel=0.12), name  # 256 entries: 4.4 %
        assert parameter.abs().max().item() <= 3 * std * (1 + 1e-6), name


def test_reset_parameters_draws_everything_again() -> None:
    """No parameter keeps its old value: what a model built on the meta device relies on."""
    model = randomised(BLT(blt_config()), seed=9)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.reset_parameters()
    assert [name for name, value in model.state_dict().items() if torch.equal(value, before[name])] == []


@pytest.mark.parametrize(
    ("byte_ids", "patch_lengths", "document_ids", "message"),
    [
        ([[5, 6]], [[2, 1]], None, "the first patch of every row must be one byte long"),
        ([[5, 6]], [[1, 1]], None, "patch_lengths must sum to T + 1 = 3"),
        ([[5, 6]], [[1, 0, 2]], None, "zeros must only trail"),
        ([[5, 6, 7]], [[1, 3]], [[0, 1, 1]], "the document at row 0, byte 1 must open with a one-byte patch"),
        ([[5, 6]], [[1, 2]], [[0]], "document_ids must be int64 [1,2]"),
    ],
)
def test_inputs_refused(
    byte_ids: list[list[int]], patch_lengths: list[list[int]], document_ids: list[list[int]] | None, message: str
) -> None:
    """The model checks what `patch_layout` checks; all its cases are in test_patch_layout.py."""
    documents = None if document_ids is None else torch.tensor(document_ids)
    with pytest.raises(ValueError, match=re.escape(message)):
        model_of("last encoder layer")(torch.tensor(byte_ids), torch.tensor(patch_lengths), documents)


SHAPE = transformer_config()
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "no width": (lambda: TransformerConfig(width=0, layers=1, heads=1), "width must be at least 1, got 0"),
    "no heads": (lambda: TransformerConfig(width=8, layers=1, heads=0), "heads must be at least 1, got 0"),
    "no multiple": (lambda: transformer_config(ffn_multiple_of=0), "ffn_multiple_of must be at least 1, got 0"),
    "negative layers": (lambda: transformer_config(layers=-1), "layers must be at least 0, got -1"),
    "odd head width": (lambda: transformer_config(width=18, heads=6), "width 18 must be a multiple of 2 x heads (6)"),
    "kv heads": (lambda: transformer_config(heads=4, kv_heads=3), "heads 4 must be a multiple of kv_heads (3)"),
    "no kv heads": (lambda: transformer_config(kv_heads=0), "heads 2 must be a multiple of kv_heads (0)"),
    "no window": (lambda: transformer_config(window=0), "window must be at least 1, got 0"),
    "no cross heads": (lambda: CrossAttentionConfig(heads=0), "heads and slots must be at least 1, got 0 and 2"),
    "no slots": (lambda: CrossAttentionConfig(slots=0), "heads and slots must be at least 1, got 16 and 0"),
    "slots without encoder cross-attention": (
        lambda: CrossAttentionConfig(encoder_layers="none"),
        "slots must be 1 when encoder_layers is none",
    ),
    "unequal local widths": (
        lambda: blt_config(decoder={"width": 32}),
        "local_decoder.width 32 must equal local_encoder.width 16",
    ),
    "cross heads": (
        lambda: blt_config(cross={"heads": 3}),
        "local_encoder.width 16 must be a multiple of cross_attention.heads 3",
    ),
    "latent window": (lambda: blt_config(latent={"window": 9}), "latent.window must be null, got 9"),
    "slots at equal widths": (lambda: blt_config(latent={"width": 16}), "cross_attention.slots must be 1"),
    "no encoder layers to attend after": (
        lambda: blt_config(encoder={"layers": 0}, cross={"encoder_layers": "all"}),
        "cross_attention.encoder_layers is all, but local_encoder.layers is 0",
    ),
    "hash size 0": (lambda: BLT(blt_config(hashes={"group_sizes": (0, 3)})), "numbers of at least 1, got [0, 3]"),
    "hash functions": (lambda: BLT(blt_config(hashes={"functions": 12})), "must lie in 1..11, got 12"),
    "hash table": (lambda: BLT(blt_config(hashes={"table_size": 0})), "hash table size must be at least 1, got 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_configurations_refused(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(ConfigError, match=re.escape(message)):
        make()
