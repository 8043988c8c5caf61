"""An entropy model with random weights, for the tests of patching."""

import pytest
import torch

from blt.checkpoint import save_entropy_model
from blt.entropy_model import EntropyModel, EntropyModelConfig
from blt.layers import TransformerConfig


@pytest.fixture(scope="session")
def entropy_model() -> EntropyModel:
    """Two small layers with random weights, its output scaled so that entropies spread over some nats."""
    torch.manual_seed(0)
    shape = TransformerConfig(width=32, layers=2, heads=2, window=64)
    model = EntropyModel(EntropyModelConfig(transformer=shape))
    with torch.no_grad():
        model.output.weight.mul_(6.0)
    return model.eval()


@pytest.fixture(scope="session")
def entropy_model_directory(entropy_model: EntropyModel, tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("entropy_model")
    save_entropy_model(entropy_model, directory)
    return str(directory)
