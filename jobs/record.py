"""What a command did: its result, and the record in its output directory that lets it skip done work.

OUTPUT is a local directory or lies on S3. Its job.json holds the resolved configuration, the fingerprint of
configuration and inputs, and the result. It is written last and at once, so it is there exactly when the output is
complete.
"""

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from blt.errors import ConfigError, DataError
from jobs.configuration import to_plain
from pipelines.storage import Storage

logger = logging.getLogger(__name__)

RECORD_NAME = "job.json"
_RECORD_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobResult:
    """What a command reports in the last line of its output. `seconds` is what the work took when it was done."""

    status: Literal["done", "skipped", "incomplete", "submitted"] = "done"
    """Incomplete: a part of the work was asked for, or a check failed. Submitted: a cluster does it. Neither is ever
    recorded."""
    seconds: float = 0.0
    path: str | None = None
    documents: int | None = None
    bytes: int | None = None
    patches: int | None = None
    mean_patch_bytes: float | None = None
    threshold: float | None = None
    bpb: float | None = None
    figures: Mapping[str, float | str | None] = dataclasses.field(default_factory=dict)
    """Further figures by name; in the JSON they stand beside the others."""

    def __post_init__(self) -> None:
        if clash := sorted(set(self.figures) & _RESULT_KEYS):
            raise ValueError(f"figures named like fields of JobResult: {', '.join(clash)}")

    def to_json(self) -> str:
        """One line of JSON, without the fields that do not apply."""
        return json.dumps(self.to_plain(), ensure_ascii=False)

    def to_plain(self) -> dict[str, Any]:
        named = {name: value for name in _FIELDS if (value := getattr(self, name)) is not None}
        return named | dict(self.figures)

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> "JobResult":
        """The result that `to_plain` gave these values for."""
        named = {name: values[name] for name in _FIELDS if name in values}
        return cls(**named, figures={name: value for name, value in values.items() if name not in _FIELDS})


_FIELDS = tuple(field.name for field in dataclasses.fields(JobResult) if field.name != "figures")
_RESULT_KEYS = frozenset((*_FIELDS, "figures"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobRecord:
    """The content of job.json: what was asked for, of which inputs, and what came of it."""

    config: Mapping[str, Any]
    inputs_fingerprint: str
    fingerprint: str
    result: JobResult


def fingerprint(config: Mapping[str, Any], inputs_fingerprint: str) -> str:
    """sha256 (hex) of a plain configuration and of what identifies the inputs."""
    text = json.dumps([config, inputs_fingerprint], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def run_once(
    output: str | Path,
    config: object,
    inputs_fingerprint: str,
    work: Callable[[], JobResult],
    *,
    ignore: tuple[str, ...] = ("output",),
    is_whole: Callable[[str], bool] = lambda output: True,
) -> JobResult:
    """Does the work unless OUTPUT/job.json says that it is done, and then records it.

    `config` is the command's dataclass; `ignore` names its dotted keys that have no say in the output (`output` itself,
    paths whose content `inputs_fingerprint` covers, resources). The same configuration and inputs give the recorded
    result with status "skipped"; others give a ConfigError that names what differs. An output without a record is
    unfinished and `work` goes on with it. The record keeps the whole configuration; a result with status "incomplete"
    is not recorded, so that the next run goes on. `is_whole` says of a recorded output whether its files are still
    there; if not, `work` goes on with it as well.
    """
    plain = to_plain(config)
    found = read_record(output)
    if found is not None:
        if differing := _differences(found, plain, inputs_fingerprint, ignore):
            raise ConfigError(
                f"{output}: holds the result of another configuration: {'; '.join(differing)}"
                " (choose another output, or remove that directory)"
            )
        if is_whole(str(output)):
            logger.info("done before, skipped path=%s seconds=%.1f", output, found.result.seconds)
            return dataclasses.replace(found.result, status="skipped", path=str(output))
        logger.warning("done before, but files are gone since: going on path=%s", output)
    started = time.monotonic()
    result = dataclasses.replace(work(), seconds=round(time.monotonic() - started, 3), path=str(output))
    if result.status != "incomplete":
        write_record(output, plain, inputs_fingerprint, result)
    return result


def read_record(output: str | Path) -> JobRecord | None:
    """The record in the directory, None if there is none. DataError if it cannot be read as one."""
    storage = Storage(str(output))
    file = storage.url(RECORD_NAME)
    try:
        values = json.loads(storage.read_bytes(RECORD_NAME))
        if values["version"] != _RECORD_VERSION:
            raise DataError(f"{file}: has version {values['version']}, this version of blt reads {_RECORD_VERSION}")
        return JobRecord(
            config=values["config"],
            inputs_fingerprint=values["inputs_fingerprint"],
            fingerprint=values["fingerprint"],
            result=JobResult.from_plain(values["result"]),
        )
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: is broken ({error}); remove it to do the work again") from error


def write_record(output: str | Path, config: Mapping[str, Any], inputs_fingerprint: str, result: JobResult) -> None:
    """Writes OUTPUT/job.json; a reader finds it whole or not at all."""
    record = {
        "version": _RECORD_VERSION,
        "fingerprint": fingerprint(config, inputs_fingerprint),
        "inputs_fingerprint": inputs_fingerprint,
        "config": config,
        "result": result.to_plain(),
    }
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    Storage(str(output)).write_replace(RECORD_NAME, text.encode())


def _differences(
    found: JobRecord, plain: Mapping[str, Any], inputs_fingerprint: str, ignore: tuple[str, ...]
) -> list[str]:
    """What to tell a user who asks for something else than the output holds; empty if it is the same."""
    before, now = _leaves(found.config), _leaves(json.loads(json.dumps(plain)))
    keys = [key for key in (*now, *(k for k in before if k not in now)) if not _is_within(key, ignore)]
    missing = object()
    differing = [
        f'key "{key}" was {_shown(before, key)}, is {_shown(now, key)}'
        for key in keys
        if before.get(key, missing) != now.get(key, missing)
    ]
    if found.inputs_fingerprint != inputs_fingerprint:
        differing.append("its inputs have changed since")
    return differing


def _leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value for every key that is not a section."""
    leaves: dict[str, Any] = {}
    for key, value in values.items():
        leaves |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return leaves


def _is_within(key: str, sections: tuple[str, ...]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def _shown(leaves: Mapping[str, Any], key: str) -> str:
    return json.dumps(leaves[key], ensure_ascii=False) if key in leaves else "not there"
