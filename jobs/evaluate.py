"""Bits per byte of a trained BLT on documents, beside its entropy model, gzip -9, xz -9, zstd -19 and an order-0 model.

The documents are a split of a patch dataset (`data`), or text that the model patches itself: files as `blt shard` reads
them (`input`, or several `sources`). Every byte and every document's end is scored once, in windows that carry context
over; a dataset whose patches are not those that the model was trained on is refused. Writes evaluation.json with a 95 %
interval, tables by source and by language, patches, FLOPs per byte, and where asked for, robustness to noise and UTF-8
validity of samples.
"""

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from blt.checkpoint import language_model_config, language_model_fingerprint
from blt.errors import ConfigError
from jobs.configuration import to_plain
from jobs.evaluate_table import print_evaluation
from jobs.progress import progress
from jobs.ray_session import ray_session
from jobs.record import JobResult, run_once
from pipelines.evaluate import (
    EvaluateConfig,
    Evaluation,
    TextConfig,
    evaluate,
    open_corpus,
    open_patched,
    read_evaluation,
    write_evaluation,
)
from pipelines.evaluate.documents import Documents
from pipelines.evaluate.evaluate import check_model
from pipelines.evaluate.evaluation import EVALUATION_PATH
from pipelines.evaluate.rejects import QUARANTINE_PATH
from pipelines.model_files import local_model
from pipelines.storage import Storage

logger = logging.getLogger(__name__)

NOT_IN_OUTPUT = (
    "output",
    "model",
    "data",
    "input",
    "min_actors",
    "max_actors",
    "cpus_per_actor",
    "gpus_per_actor",
    "memory_bytes_per_actor",
    "wait_for_resources",
    "stall_seconds",
)
"""Keys that have no say in the output: resources, and paths whose content the fingerprint of the inputs covers."""

OPTIONS = ("model",)


@dataclass(frozen=True, kw_only=True)
class Config(EvaluateConfig, TextConfig):
    """Keys of `blt eval`."""

    model: str
    """Directory of the trained model (`blt train` writes it as OUTPUT/model)."""
    data: str | None = None
    """Patch dataset (the output of `blt patch`); this, or `input`, or `sources`."""
    output: str
    """Directory that gets evaluation.json."""

    def __post_init__(self) -> None:
        EvaluateConfig.__post_init__(self)
        if self.data is None:
            if not self.input and not self.sources:
                raise ConfigError("data (a patch dataset), input (text files) or sources must be given")
            TextConfig.__post_init__(self)
            if self.split != "valid":
                raise ConfigError("split goes with data: text that is given as input is scored whole")
            return
        for field in dataclasses.fields(TextConfig):
            if getattr(self, field.name) != field.default:
                raise ConfigError(f"{field.name} goes with input, and not with data")

    def documents(self) -> Documents:
        """What is evaluated."""
        if self.data is not None:
            return open_patched(self.data, self.split)
        text = TextConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(TextConfig)})
        return open_corpus(text, self.output)


def run(config: Config) -> JobResult:
    """Evaluate into `config.output` unless that is done, and print the tables."""
    documents, directory = config.documents(), local_model(config.model)
    check_model(config, documents, language_model_config(directory), config.model)

    def work() -> JobResult:
        with ray_session(), progress("eval", total=documents.input_bytes, unit="bytes") as bar:
            evaluation = evaluate(config, config.model, documents, bar.advance)
        write_evaluation(config.output, evaluation)
        _tell_rejected(config.output, evaluation)
        if config.samples and evaluation.samples is None:
            logger.warning("samples=0: no document begins with text that could be continued")
        return _result(evaluation)

    inputs = f"model={language_model_fingerprint(directory)} data={documents.fingerprint}"
    places = (f"sources.{source.name}.input" for source in config.sources)
    ignore = (*NOT_IN_OUTPUT, *places)
    result = run_once(config.output, _recorded(config), inputs, work, ignore=ignore, is_whole=_is_whole)
    print_evaluation(read_evaluation(config.output))
    return result


def _is_whole(output: str) -> bool:
    return Storage(output).exists(EVALUATION_PATH)


def _recorded(config: Config) -> Mapping[str, Any]:
    """The configuration with its sources by name, so that their order, and where they lie, can have no say."""
    return {**to_plain(config), "sources": {source.name: to_plain(source) for source in config.sources}}


def _tell_rejected(output: str, evaluation: Evaluation) -> None:
    for source, rows in evaluation.rows.items():
        if rows.quarantined:
            path = Storage(output).url(QUARANTINE_PATH)
            logger.warning(
                "source=%s rows_quarantined=%d of=%d listed=%s", source, rows.quarantined, rows.rows_in, path
            )


def _result(evaluation: Evaluation) -> JobResult:
    bpb = {"low": evaluation.bpb_low, "high": evaluation.bpb_high, **evaluation.baselines}
    if evaluation.entropy_model_bpb is not None:
        bpb["entropy_model"] = evaluation.entropy_model_bpb
    return JobResult(
        documents=evaluation.documents,
        bytes=evaluation.bytes,
        patches=evaluation.patches,
        mean_patch_bytes=round(evaluation.mean_patch_bytes, 4),
        bpb=round(evaluation.bpb, 4),
        figures={
            **{f"bpb_{name.replace(' -', '_').replace('-', '_')}": round(value, 4) for name, value in bpb.items()},
            **_rounded("accuracy", evaluation.accuracy),
            **_rounded("one_byte_share", evaluation.one_byte_share),
            **_rounded("flops_per_byte", evaluation.flops_per_byte, None),
            **_rounded("entropy_model_flops_per_byte", evaluation.entropy_model_flops_per_byte, None),
            **_noise_figures(evaluation),
            **_sample_figures(evaluation),
            **_row_figures(evaluation),
            "bytes_per_second": round(evaluation.bytes_per_second),
        },
    )


def _noise_figures(evaluation: Evaluation) -> dict[str, float]:
    figures: dict[str, float] = {}
    for row in evaluation.noise[1:]:
        figures |= _rounded(f"bpb_{row.noise}", row.bpb) | _rounded(f"accuracy_{row.noise}", row.accuracy)
    return figures


def _sample_figures(evaluation: Evaluation) -> dict[str, float]:
    found = evaluation.samples
    if found is None:
        return {}
    return {
        "valid_utf8_share": round(found.valid_share, 4),
        "invalid_utf8_per_kb": round(found.invalid_per_kb, 4),
    }


def _row_figures(evaluation: Evaluation) -> dict[str, float]:
    if not evaluation.rows:
        return {}
    return {
        name: sum(getattr(rows, name) for rows in evaluation.rows.values())
        for name in ("rows_in", "quarantined", "filtered")
    }


def _rounded(name: str, value: float | None, digits: int | None = 4) -> dict[str, float]:
    return {} if value is None else {name: round(value, digits)}
