"""The adapter to lm-evaluation-harness: requests of its tasks in, the respondent's answers out.

It is the model "blt" of the harness, which finds no models of other packages by itself; this module run as a program is
the harness's own command line with it:

    python -m jobs.harness_model run --model blt --model_args model=DIR --tasks arc_easy --batch_size 16

`blt eval harness` is the shorter way. Needs the extra `eval`. What the harness counts in tokens are bytes here.
"""

import codecs
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs

from blt.checkpoint import language_model_fingerprint, load
from blt.errors import ConfigError
from jobs.progress import progress
from pipelines.evaluate.respondent import Generation, Respondent, RespondentConfig
from pipelines.model_files import local_model

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names that tasks have for the longest answer; the harness makes one of them."""
READ_ARGUMENTS = frozenset((*LIMITS, "until", "do_sample", "temperature", "top_k", "top_p"))
"""Arguments of generation that are used; others change nothing here and are told."""

Answer = TypeVar("Answer")


@register_model("blt")
class HarnessModel(LM):  # type: ignore[misc]
    """A language model of ours as the harness asks it. Texts are UTF-8; a document's EOS is not charged."""

    def __init__(
        self,
        model: str,
        *,
        device: str | None = None,
        dtype: str = "float32",
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        max_new_bytes: int = 256,
        seed: int = 0,
        **limits: int,
    ) -> None:
        """`model` is the directory of a trained model; `batch_size` prompts are continued together. `max_new_bytes`
        holds where a task names no limit, `seed` where it draws. `limits`: sequence_bytes, sequence_patches,
        batch_bytes and row_bytes, as of `blt eval`.
        """
        super().__init__()
        if dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        known = {field.name for field in fields(RespondentConfig)} - {"batch_prompts"}
        if unknown := sorted(set(limits) - known):
            raise ConfigError(
                f"{unknown[0]} is no argument of the model (accepted besides: {', '.join(sorted(known))})"
            )
        config = RespondentConfig(batch_prompts=_batch_size(batch_size, max_batch_size), **limits)
        directory = local_model(model)
        self._device = torch.device(_device(device))
        self._respondent = Respondent(load(directory, device=self._device, dtype=DTYPES[dtype]), config)
        self._max_new_bytes, self._seed = max_new_bytes, seed
        self._info = {"model_sha": language_model_fingerprint(directory), "model_dtype": dtype}
        self.batch_sizes = {0: config.batch_prompts}

    def get_model_info(self) -> dict[str, object]:
        """What the harness writes beside the results."""
        lm, config = self._respondent.lm, self._respondent.config
        return {
            **self._info,
            "model_num_parameters": sum(parameter.numel() for parameter in lm.model.parameters()),
            "sequence_bytes": config.sequence_bytes,
            "sequence_patches": config.sequence_patches,
            "contexts_cut": self._respondent.num_cut,
            "context_bytes_cut": self._respondent.bytes_cut,
        }

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """ln p of each continuation after its context, and whether greedy generation gives it."""
        pairs = [(context.encode(), continuation.encode()) for context, continuation in _arguments(requests)]
        found = self._asked("loglikelihood", len(pairs), lambda told: self._respondent.likelihoods(pairs, told))
        answers = [(-answer.nats, answer.greedy) for answer in found]
        self._cache("loglikelihood", requests, answers)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """ln p of each text after BOS, of any length."""
        texts = [text.encode() for (text,) in _arguments(requests)]
        found = self._asked("loglikelihood_rolling", len(texts), lambda told: self._respondent.text_nats(texts, told))
        answers = [-nats for nats in found]
        self._cache("loglikelihood_rolling", requests, answers)
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What follows each prompt, up to a stop text, EOS or the limit in bytes; a character that the limit cuts is
        left out, and bytes that are not UTF-8 become U+FFFD.

        Draws of a request that is asked for several times have different seeds.
        """
        groups: dict[Generation, list[int]] = defaultdict(list)
        prompts, asked = [], Counter[tuple[str, Generation]]()
        for number, (prompt, arguments) in enumerate(_arguments(requests)):
            how = generation(arguments, self._max_new_bytes)
            if how.temperature:
                asked[prompt, how] += 1
                how = replace(how, seed=self._seed + asked[prompt, how] - 1)
            groups[how].append(number)
            prompts.append(prompt.encode())
        answers = [""] * len(prompts)
        with progress("generate_until", total=len(prompts), unit="requests") as bar:
            for how, numbers in groups.items():
                found = self._respondent.continuations([prompts[number] for number in numbers], how, bar.advance)
                for number, data in zip(numbers, found, strict=True):
                    answers[number] = decoded(data)
        unread = {name for _, arguments in _arguments(requests) for name in arguments} - READ_ARGUMENTS
        if unread:
            logger.warning("arguments of generation that change nothing here: %s", ", ".join(sorted(unread)))
        self._tell_cut()
        self._cache("generate_until", requests, answers)
        return answers

    def _asked(self, name: str, count: int, ask: Callable[[Callable[[int], None]], list[Answer]]) -> list[Answer]:
        """The answers, with a bar of how far they are, and a word on what was cut for them."""
        with progress(name, total=count, unit="requests") as bar:
            answers = ask(bar.advance)
        self._tell_cut()
        return answers

    def _tell_cut(self) -> None:
        if self._respondent.num_cut:
            logger.warning(
                "contexts longer than the model's windows, cut on the left: contexts_cut=%d bytes_cut=%d "
                "sequence_bytes=%d",
                self._respondent.num_cut,
                self._respondent.bytes_cut,
                self._respondent.config.sequence_bytes,
            )

    def _cache(self, name: str, requests: Sequence[Instance], answers: Sequence[object]) -> None:
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial(name, request.args, answer)


def generation(arguments: Mapping[str, Any], max_new_bytes: int) -> Generation:
    """What a task's arguments of generation mean; `max_new_bytes` holds where they name no limit."""
    given = normalize_gen_kwargs(dict(arguments), max_new_bytes)
    top_k, top_p = given.get("top_k"), given.get("top_p")
    return Generation(
        max_new_bytes=int(given["max_gen_toks"]),
        stop=tuple(text.encode() for text in given["until"] if text),
        temperature=float(given.get("temperature", 0.0)),
        top_k=int(top_k) if top_k and top_k > 0 else None,  # 0 and -1 stand for all
        top_p=float(top_p) if top_p else None,
    )


def decoded(data: bytes) -> str:
    """The text of generated bytes: a character that is not complete at the end is left out, other bytes that are not
    UTF-8 become U+FFFD."""
    return codecs.getincrementaldecoder("utf-8")("replace").decode(data)


def _arguments(requests: Sequence[Instance]) -> list[tuple[Any, ...]]:
    return [tuple(request.args) for request in requests]


def _batch_size(given: int | str | None, most: int | None) -> int:
    """A number; the harness also knows "auto" and "auto:N", for which there is the default here."""
    default = RespondentConfig.batch_prompts
    if given is None or str(given).startswith("auto"):
        return min(default, most or default)
    return int(given)


def _device(given: str | None) -> str:
    """The harness's command line asks for CUDA unless told otherwise, whether there is any or not."""
    if given is not None and given.startswith("cuda") and not torch.cuda.is_available():
        logger.warning("device=%s asked for, but there is no CUDA device: the CPU is used", given)
        return "cpu"
    return given or "cpu"


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
