"""The entropy model as an actor holds it: loaded once, checked against the fingerprint that the plan names."""

import torch

from blt.checkpoint import entropy_model_fingerprint, load_entropy_model
from blt.entropy_model import EntropyModel
from blt.errors import CheckpointError
from pipelines.model_files import local_model

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_model(entropy_model: str, fingerprint: str, device: str, dtype: str, num_threads: int) -> EntropyModel:
    """The model of the directory or URI `entropy_model`, ready for inference with `num_threads` CPU threads.

    CheckpointError if it is broken or not the model with `fingerprint`: the directory changed since the plan was made,
    or this machine sees another one.
    """
    torch.set_num_threads(num_threads)
    directory = local_model(entropy_model)
    found = entropy_model_fingerprint(directory)
    if found != fingerprint:
        raise CheckpointError(
            f"entropy model {entropy_model} has fingerprint {found[:12]}..., expected {fingerprint[:12]}...: "
            "it changed while it was in use"
        )
    model = load_entropy_model(directory, torch.device(device), _DTYPES[dtype])
    return model.eval().requires_grad_(False)
