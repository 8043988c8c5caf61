"""Models laid out for steps: the same functions with norms folded in, and what is left as it is."""

import pytest
import torch

from blt.decoding_cache import StackCache
from blt.entropy_model import EntropyModel, EntropyModelConfig
from blt.model import BLT
from blt.step_blocks import blt_for_steps, entropy_model_for_steps
from tests.model_cases import blt_config, randomised, transformer_config


@pytest.mark.parametrize("kv_heads", [None, 1])
@torch.inference_mode()
def test_steps_are_those_of_the_plain_blocks(kv_heads: int | None) -> None:
    shape = transformer_config(layers=2, window=3, kv_heads=kv_heads)
    model = randomised(EntropyModel(EntropyModelConfig(transformer=shape))).double()
    laid_out = entropy_model_for_steps(model)
    caches = [StackCache(shape, 2, model.output.weight) for _ in range(2)]
    for ids in torch.randint(4, 260, (7, 2, 1)):
        expected, found = (m.logits(ids, cache.step()) for m, cache in zip((model, laid_out), caches, strict=True))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_embeddings_are_shared_and_the_model_stays_as_it_is() -> None:
    model = BLT(blt_config())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    laid_out = blt_for_steps(model)
    assert laid_out.local_encoder.byte_embedding is model.local_encoder.byte_embedding
    assert laid_out.local_encoder.hash_embedding is model.local_encoder.hash_embedding
    assert laid_out.local_encoder.blocks is not model.local_encoder.blocks
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_half_precision_steps_are_those_of_the_model() -> None:
    model = BLT(blt_config()).bfloat16()
    assert blt_for_steps(model) is model
