"""Bits per byte of a BLT on documents: units of them to an actor pool, the scores of each document back.

What comes out does not depend on the number of actors: a unit is computed alone, and scores are added in the order of
the documents. Counts are held against what is known, so no document is left out or scored twice.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from blt.checkpoint import LanguageModelConfig, entropy_model_config, language_model_config, language_model_fingerprint
from blt.errors import ConfigError
from pipelines.actor_pool import run_units
from pipelines.evaluate.actor import EvaluateActor, UnitScores
from pipelines.evaluate.baselines import Baselines
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.documents import Documents, Part, UnitCounts
from pipelines.evaluate.evaluation import (
    Evaluation,
    LanguageFigures,
    NoiseFigures,
    NotText,
    PartFigures,
    SourceFigures,
)
from pipelines.evaluate.figures import Judge
from pipelines.evaluate.patcher import check_can_patch
from pipelines.evaluate.prompts import Prompt, choose
from pipelines.evaluate.samples import sample
from pipelines.evaluate.scores import CLEAN, Scores, decode_scores, scores_of
from pipelines.model_files import local_model
from pipelines.storage import Storage


@dataclass(frozen=True, kw_only=True)
class _Found:
    """What the units gave, put together in their order."""

    counts: list[UnitCounts]
    scores: Scores
    prompts: list[Prompt]
    scoring_seconds: float

    @property
    def languages(self) -> list[str | None]:
        """None stands for documents that name none, where others do; empty where no document names one."""
        found = self.scores.languages
        return [] if found == [None] else found


def evaluate(
    config: EvaluateConfig,
    model: str,
    documents: Documents,
    on_progress: Callable[[int], None] = lambda num_bytes: None,
) -> Evaluation:
    """Score the BLT of the directory `model` on documents, and the baselines on the same bytes.

    `on_progress` is told how much of the documents' `input_bytes` each finished unit was. Ray must be initialised.
    ConfigError for documents that do not go with the model, DataError or CheckpointError for what is broken.
    """
    started = time.perf_counter()
    directory, everywhere = local_model(model), Storage(model).root_uri
    judge = _judge(config, directory)
    check_model(config, documents, judge.model, model)
    baselines = Baselines(documents, config.compressors)
    sources = _start_baselines(baselines, documents)
    documents.begin()
    found = _score_units(config, everywhere, documents, on_progress)
    rows = documents.finish(found.counts)
    languages = [Part(kind="language", name=name) for name in found.languages]
    for part in languages:
        baselines.start(part)
    samples = sample(config, everywhere, found.prompts) if config.samples else None
    clean = found.scores.of(CLEAN)

    def figures(part: Part) -> PartFigures:
        chosen = clean.part(part)
        return judge.part_figures(chosen, baselines.bits_per_byte(part, chosen.sum("bytes")))

    total = figures(Part())
    return Evaluation(
        **vars(total),
        per_source=tuple(SourceFigures(source=str(part.name), **vars(figures(part))) for part in sources),
        per_language=tuple(LanguageFigures(language=part.name, **vars(figures(part))) for part in languages),
        noise=_noise_figures(config, judge, found.scores),
        not_text=_not_text(clean) if config.noises else None,
        samples=samples,
        rows=dict(rows),
        seconds=time.perf_counter() - started,
        bytes_per_second=total.bytes / found.scoring_seconds,
        split=documents.split,
        sequence_patches=config.sequence_patches,
        sequence_bytes=config.sequence_bytes,
        model=language_model_fingerprint(directory),
        data=documents.fingerprint,
    )


def check_model(config: EvaluateConfig, documents: Documents, model: LanguageModelConfig, directory: str) -> None:
    """ConfigError unless the model can be evaluated so on these documents."""
    documents.check_model(model, directory)
    if config.noises:
        check_can_patch(model, directory, 'key "noise"')
    if config.samples:
        check_can_patch(model, directory, 'key "samples"')
        if model.patch_rule.kind == "top_k":
            raise ConfigError('key "samples": the patch rule top_k looks ahead, so its model cannot generate')


def _start_baselines(baselines: Baselines, documents: Documents) -> list[Part]:
    """Those of all documents and of each source, beside the actors, because xz alone may take as long as they do. The
    sources are returned."""
    sources = [Part(kind="source", name=name) for name in documents.sources]
    baselines.start(Part())
    for part in sources:
        if len(sources) == 1:
            baselines.share(part, Part())
        else:
            baselines.start(part)
    return sources


def _judge(config: EvaluateConfig, directory: str) -> Judge:
    model = language_model_config(directory)
    entropy_model = entropy_model_config(Path(directory) / "entropy_model") if model.entropy_stored else None
    return Judge(config=config, model=model, entropy_model=entropy_model)


def _score_units(
    config: EvaluateConfig, model: str, documents: Documents, on_progress: Callable[[int], None]
) -> _Found:
    """The scores of all units, in their order."""
    units = documents.units()
    found: dict[int, UnitScores] = {}
    prompts: list[Prompt] = []
    items = [{"unit": msgspec.json.encode(unit).decode()} for unit in units]
    for row in run_units(items, EvaluateActor, {"config": config, "model": model, "documents": documents}, config):
        scores = msgspec.msgpack.decode(row["scores"], type=UnitScores)
        found[scores.counts.unit.number] = scores
        prompts = choose([*prompts, *scores.prompts], config.samples)
        on_progress(documents.unit_bytes(scores.counts))
    in_order = [found[unit.number] for unit in units]
    return _Found(
        counts=[scores.counts for scores in in_order],
        scores=scores_of([decode_scores(scores.scores) for scores in in_order]),
        prompts=prompts,
        scoring_seconds=sum(scores.scoring_seconds for scores in in_order),
    )


def _noise_figures(config: EvaluateConfig, judge: Judge, scores: Scores) -> tuple[NoiseFigures, ...]:
    """The documents that are text as they are, and under each noise."""
    text = scores.where(scores.columns["is_text"])
    forms = (CLEAN, *config.noises) if config.noises else ()
    return tuple(NoiseFigures(noise=form, **vars(judge.score_figures(text.of(form)))) for form in forms)


def _not_text(clean: Scores) -> NotText:
    """The documents that are no text."""
    others = clean.where(~clean.columns["is_text"])
    return NotText(documents=others.documents, bytes=others.sum("bytes"))
