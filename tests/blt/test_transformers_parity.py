"""Equal to transformers' BltForCausalLM and its patcher on shared random weights, in float32.

Logits and entropies within 3e-5, every gradient within 1e-4 of its largest entry: the two sum in another order, which
moves float32 logits by 1e-6 to 1e-5 here. Inputs hold no EOS, since transformers has no document masks; the rest that
is left to the oracle is listed in tests/parity.py.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blt.entropy_model import EntropyModelConfig, document_entropies, next_byte_entropy
from blt.loss import NO_TARGET, summed_cross_entropy
from blt.model import BLTConfig
from blt.patching import PatchRule, patch_lengths
from blt.vocabulary import BOS, encode
from tests.model_cases import blt_config, gradients, largest_difference, plain_batch, transformer_config
from tests.parity import blt_pair, entropy_pair, under_our_names, unused

LOGITS, GRADIENTS = 3e-5, 1e-4


def largest(tensor: Tensor) -> Tensor:
    return tensor.abs().max()


def config(**changes: dict[str, object]) -> BLTConfig:
    """Local width 32 (no `cross` heads but the local ones), latent width 48, window 20 unless changed."""
    local = {"width": 32, "window": 20, "rope_theta": 500000.0}
    return blt_config(
        encoder={**local, "layers": 2, **changes.get("encoder", {})},
        decoder={**local, **changes.get("decoder", {})},
        latent={"width": 48, "rope_theta": 500000.0, **changes.get("latent", {})},
        cross=changes.get("cross", {}),
        hashes={"group_sizes": (3, 4, 5), "table_size": 97, **changes.get("hashes", {})},
    )


def window(size: int | None) -> dict[str, dict[str, object]]:
    return {"encoder": {"window": size}, "decoder": {"window": size}}


CASES = {
    "last encoder layer, k 2, latent projection": config(),
    "no latent projection": config(latent={"width": 64}),
    "k 1": config(cross={"slots": 1}),
    "k 4": config(cross={"slots": 4}),
    "k 4 without latent projection": config(cross={"slots": 4}, latent={"width": 128, "layers": 1}),
    "all encoder layers, of one": config(encoder={"layers": 1}, cross={"encoder_layers": "all"}),
    "three encoder layers, first decoder layer": config(encoder={"layers": 3}, cross={"decoder_layers": "first"}),
    "window 1": config(**window(1)),
    "window 129": config(**window(129)),
    "window longer than the row": config(**window(512)),
    "no window": config(**window(None)),
    "latent GQA": config(latent={"heads": 4, "kv_heads": 2, "width": 32 * 3}),
    "three hash functions of one size": config(hashes={"group_sizes": (4,), "functions": 3}),
    "two hash functions of two sizes": config(hashes={"group_sizes": (2, 8), "functions": 2}),
    "epsilon and theta": config(encoder={"norm_eps": 1e-3}, decoder={"norm_eps": 1e-2}, latent={"rope_theta": 100.0}),
}


def targets_of(byte_ids_BT: Tensor) -> Tensor:
    """Next bytes, none for a row's last: what transformers makes of `labels`."""
    return F.pad(byte_ids_BT[:, 1:], (0, 1), value=NO_TARGET)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("length", [7, 200])
def test_blt(name: str, length: int) -> None:
    batch = plain_batch(2, length, seed=length, first_id=4, alphabet=40)
    theirs, ours = blt_pair(CASES[name], seed=length)
    assert unused(ours, theirs) == set()
    expected = theirs(
        input_ids=batch.byte_ids, patch_lengths=batch.patch_lengths, labels=batch.byte_ids, use_cache=False
    )
    logits = ours(batch.byte_ids, batch.patch_lengths)
    assert float((logits - expected.logits).detach().abs().max()) < LOGITS
    loss = summed_cross_entropy(logits, targets_of(batch.byte_ids)) / (2 * (length - 1))
    torch.testing.assert_close(loss, expected.loss, rtol=0, atol=LOGITS)
    expected_grads = under_our_names(ours, gradients(expected.loss, theirs))
    assert largest_difference(gradients(loss, ours), expected_grads, largest) < GRADIENTS


def test_decoder_without_projection() -> None:
    """Where latent and local widths agree (k 1) there is no decoder projection; transformers always has one, so it
    is given the identity."""

    def identity(theirs: nn.Module) -> None:
        with torch.no_grad():
            weight = theirs.get_parameter("model.local_decoder.patch_embedding_projection.weight")
            weight.copy_(torch.eye(len(weight)))

    theirs, ours = blt_pair(config(cross={"slots": 1}, latent={"width": 32}), seed=1, edit=identity)
    assert unused(ours, theirs) == {"model.local_decoder.patch_embedding_projection.weight"}
    batch = plain_batch(2, 50, seed=1, first_id=4)
    expected = theirs(input_ids=batch.byte_ids, patch_lengths=batch.patch_lengths, use_cache=False).logits
    logits = ours(batch.byte_ids, batch.patch_lengths)
    assert float((logits - expected).detach().abs().max()) < LOGITS
    targets = targets_of(batch.byte_ids)
    expected_grads = under_our_names(ours, gradients(summed_cross_entropy(expected, targets), theirs))
    grads = gradients(summed_cross_entropy(logits, targets), ours)
    assert largest_difference(grads, expected_grads, largest) < GRADIENTS


ENTROPY_SHAPES = {
    "window shorter than the row": transformer_config(width=32, layers=3, window=20),
    "window of 129": transformer_config(width=32, layers=2, window=129),
    "window longer than the row": transformer_config(width=32, layers=2, window=512),
    "GQA": transformer_config(width=32, heads=4, kv_heads=2, window=9),
}


@pytest.mark.parametrize("name", ENTROPY_SHAPES)
def test_entropy_model(name: str) -> None:
    theirs, ours = entropy_pair(EntropyModelConfig(transformer=ENTROPY_SHAPES[name]), seed=3)
    assert unused(ours, theirs) == set()
    byte_ids = plain_batch(2, 300, seed=3, first_id=4).byte_ids
    entropies, _, expected = theirs(byte_ids)
    logits = ours(byte_ids)
    assert float((logits - expected).detach().abs().max()) < LOGITS
    assert float((next_byte_entropy(logits) - entropies).detach().abs().max()) < LOGITS
    targets = targets_of(byte_ids)
    expected_grads = under_our_names(ours, gradients(summed_cross_entropy(expected, targets), theirs))
    assert (
        largest_difference(gradients(summed_cross_entropy(logits, targets), ours), expected_grads, largest) < GRADIENTS
    )


@pytest.mark.parametrize("quantile", [0.0, 0.5, 0.8, 1.0])
def test_patcher(quantile: float) -> None:
    """Entropies of a document and its patch lengths, the threshold in a gap between entropies. One row: transformers'
    lengths of a batch of unequal patch counts hold negative numbers."""
    theirs, ours = entropy_pair(EntropyModelConfig(transformer=ENTROPY_SHAPES["GQA"]), seed=4)
    document = bytes(plain_batch(1, 400, seed=4).byte_ids[0].remainder(256).tolist())
    byte_ids = torch.cat((torch.tensor([BOS]), encode(document)))
    entropies = document_entropies(ours, [document])[0]
    ordered = entropies.double().sort().values
    gaps = ordered.diff()
    lowest = min(int(quantile * len(gaps)), len(gaps) - 20)
    place = lowest + int(gaps[lowest : lowest + 20].argmax())
    threshold = float(ordered[place] + gaps[place] / 2)
    with torch.no_grad():
        expected, lengths, _ = theirs(byte_ids[None], patch_size=4, threshold=threshold)
    assert float((entropies - expected[0]).abs().max()) < LOGITS
    assert float((entropies - threshold).abs().min()) > LOGITS, "the threshold must stand in a gap"
    found = patch_lengths(byte_ids, entropies, PatchRule(threshold=threshold))
    assert found[found > 0].tolist() == lengths[0][lengths[0] > 0].tolist()
