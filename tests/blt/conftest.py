"""For the tests of blt: one thread, and models of a few thousand parameters with random weights.

One thread, because their tensors are so small that a second one costs time, most on a busy machine.
"""

from collections.abc import Callable, Iterator

import pytest
import torch

from blt.checkpoint import LanguageModel
from blt.entropy_model import EntropyModel, EntropyModelConfig
from blt.layers import TransformerConfig
from blt.local_encoder import CrossAttentionConfig, HashEmbeddingConfig
from blt.model import BLT, BLTConfig
from blt.patching import PatchRule

# Random entropies lie around 5.2 nats here, so that this threshold makes patches of a few bytes.
SMALL_RULE = PatchRule(threshold=5.22, max_patch_length=12)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small_stack(width: int, layers: int, window: int | None = 16, theta: float = 10000.0) -> TransformerConfig:
    return TransformerConfig(width=width, layers=layers, heads=2, ffn_multiple_of=16, window=window, rope_theta=theta)


@pytest.fixture
def small_blt_config() -> BLTConfig:
    return BLTConfig(
        local_encoder=small_stack(32, 1),
        latent=small_stack(64, 2, None, 500000.0),
        local_decoder=small_stack(32, 2),
        cross_attention=CrossAttentionConfig(heads=2),
        hash_embedding=HashEmbeddingConfig(group_sizes=(3, 4), functions=2, table_size=101),
    )


@pytest.fixture
def small_entropy_model() -> EntropyModel:
    torch.manual_seed(1)
    return EntropyModel(EntropyModelConfig(transformer=small_stack(32, 2)))


@pytest.fixture
def language_model(small_blt_config: BLTConfig, small_entropy_model: EntropyModel) -> Callable[..., LanguageModel]:
    """Builds a language model with the given patch rule and newline reset."""

    def build(rule: PatchRule = SMALL_RULE, reset_on_newline: bool = False) -> LanguageModel:
        torch.manual_seed(0)
        return LanguageModel(
            model=BLT(small_blt_config),
            entropy_model=small_entropy_model,
            patch_rule=rule,
            reset_on_newline=reset_on_newline,
            config=small_blt_config,
            provenance={"data": "tests"},
        )

    return build
