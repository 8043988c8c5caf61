"""docs/evaluation.md: every key of evaluation.json is explained, and no other."""

import dataclasses
import re
from pathlib import Path

from pipelines.evaluate.evaluation import Evaluation, LanguageFigures, NoiseFigures, NotText, SourceFigures
from pipelines.evaluate.noise import NOISES
from pipelines.evaluate.samples import SampleFigures
from pipelines.manifest import SourceCounts

DOC = (Path(__file__).parent.parent / "docs" / "evaluation.md").read_text(encoding="utf-8")


def test_every_key_is_explained() -> None:
    records = (Evaluation, LanguageFigures, NoiseFigures, NotText, SampleFigures, SourceCounts, SourceFigures)
    keys = {field.name for record in records for field in dataclasses.fields(record)}
    assert sorted(key for key in keys | set(NOISES) if f"`{key}`" not in DOC) == []
    tabled = {key for row in re.findall(r"^\| (`.*?) \|", DOC, re.MULTILINE) for key in re.findall(r"`(\w+)`", row)}
    assert tabled - {"clean", "noise"} <= keys | set(NOISES)
