"""The model that is evaluated, as an actor holds it: loaded with its first unit."""

import torch

from blt.checkpoint import LanguageModel, load
from pipelines.evaluate.config import EvaluateConfig
from pipelines.model_files import local_model

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class EvaluatedModel:
    """A language model's directory. It is not loaded before it is used: an error in the constructor of an actor would
    reach the driver as a death.
    """

    def __init__(self, directory: str, config: EvaluateConfig) -> None:
        self.directory, self._config = directory, config
        self._loaded: LanguageModel | None = None

    def load(self) -> LanguageModel:
        """The model, ready for inference with the actor's CPU threads; CheckpointError if it is broken."""
        if self._loaded is None:
            torch.set_num_threads(self._config.cpus_per_actor)
            device, dtype = self._config.device, _DTYPES[self._config.dtype]
            self._loaded = load(local_model(self.directory), device=device, dtype=dtype)
            self._loaded.model.eval()
            if self._loaded.entropy_model is not None:
                self._loaded.entropy_model.eval()
        return self._loaded
