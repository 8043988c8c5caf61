"""Samples on disk: what a model made of prompts, so that it can be shown again exactly.

OUTPUT/sample.json holds one sample, OUTPUT/samples.jsonl those of several prompts, one in a line, in their order.
"""

import base64
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from blt.errors import DataError
from pipelines.storage import Storage

SAMPLE_NAME = "sample.json"
SAMPLES_NAME = "samples.jsonl"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A prompt and its continuation."""

    prompt: str
    """Bytes that are not UTF-8 stand as U+FFFD."""
    text: str
    """The continuation; bytes that are not UTF-8 stand as U+FFFD."""
    bytes: int
    """Of the continuation, as generated."""
    valid_utf8: bool
    """Whether the continuation is; if not, `text_base64` has its bytes."""
    prompt_base64: str | None = None
    """The exact prompt, where it is not UTF-8."""
    text_base64: str | None = None
    """The exact continuation, where it is not UTF-8: one that ends inside a character, for instance."""
    patch_starts: tuple[int, ...] | None = None
    """Indices of the continuation's bytes that start a patch; None in files that were written without them."""
    seconds: float
    """From the first byte of the prompt to the last of the continuation, without loading the model; of several prompts
    the time of those that were continued together."""
    bytes_per_second: float
    seed: int
    temperature: float
    top_k: int | None
    top_p: float | None
    model: str
    """Fingerprint of the BLT."""

    def to_json(self, indent: int | None = None) -> str:
        """Without what does not apply: the exact bytes of what is UTF-8."""
        values = dataclasses.asdict(self)
        exact = ("prompt_base64", "text_base64")
        told = {name: value for name, value in values.items() if value is not None or name not in exact}
        return json.dumps(told, ensure_ascii=False, indent=indent)


def continuation(sample: Sample) -> bytes:
    """The bytes as they were generated."""
    return base64.b64decode(sample.text_base64) if sample.text_base64 is not None else sample.text.encode()


def exact_base64(data: bytes) -> str | None:
    """base64 of bytes that are not UTF-8; None for those that are."""
    try:
        data.decode()
    except UnicodeDecodeError:
        return base64.b64encode(data).decode()
    return None


def samples_path(lines: bool) -> str:
    """The file of one sample, or of several."""
    return SAMPLES_NAME if lines else SAMPLE_NAME


def write_samples(root: str, samples: Sequence[Sample], *, lines: bool) -> None:
    """Write the file of one sample, or with `lines` that of several; a reader finds it whole."""
    texts = [sample.to_json(None if lines else 1) + "\n" for sample in samples]
    Storage(root).write_replace(samples_path(lines), "".join(texts).encode())


def read_samples(root: str, *, lines: bool) -> list[Sample]:
    """What `write_samples` wrote; DataError, naming the file, for what cannot be read as that."""
    storage, path = Storage(root), samples_path(lines)
    data = storage.read_bytes(path)
    try:
        return [msgspec.json.decode(text, type=Sample) for text in (data.splitlines() if lines else [data])]
    except ValueError as error:
        raise DataError(f"cannot read {storage.url(path)}: {error}") from error
