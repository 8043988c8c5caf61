"""Log lines as JSON: a record of `logging` in, one object on one line out, with what is known of its process and run.

A driver that is asked for such lines (`lines_of_a_run`) has the workers of its Ray write them too: `worker_runtime_env`
tells them what to put into every line, and whether details belong to it. Theirs go to the standard error of each, which
Ray keeps in its session's directory and sends to the driver. docs/metrics.md lists the fields.
"""

import contextlib
import json
import logging
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

PRINTED = "workers"
"""Logger of what workers printed otherwise, as jobs/worker_lines.py has it."""
OWN_LOGGERS = ("blt", "pipelines", "jobs", PRINTED)
WORKERS_VARIABLE = "BLT_LOG_LINES"
"""Environment variable of workers: how they are to log, as JSON."""

Field = str | int | None


@dataclass(kw_only=True)
class Lines:
    """What is known of this process and its run, whether its lines are JSON, and whether details belong to them."""

    fields: dict[str, Field] = field(default_factory=lambda: {"run": None, "process": "driver"})
    as_json: bool = False
    details: bool = False


_lines = Lines()


@contextlib.contextmanager
def lines_of_a_run(*, as_json: bool, details: bool) -> Iterator[None]:
    """A run begins, of which nothing is known yet; its workers log as it does for the length of the block."""
    global _lines
    before, _lines = _lines, Lines(as_json=as_json, details=details)
    try:
        yield
    finally:
        _lines = before


def are_json() -> bool:
    return _lines.as_json


def add_fields(**fields: Field) -> None:
    """This is known of the process from now on."""
    _lines.fields.update(fields)


def own_fields() -> dict[str, Field]:
    """What is known of this process and its run, by name of the field."""
    return dict(_lines.fields)


def worker_runtime_env() -> dict[str, Any] | None:
    """What `ray.init` gives to the workers of a driver; None where lines are not JSON."""
    if not _lines.as_json:
        return None
    hook = f"{begin_in_worker.__module__}.{begin_in_worker.__name__}"
    return {"env_vars": {WORKERS_VARIABLE: json.dumps(asdict(_lines))}, "worker_process_setup_hook": hook}


def begin_in_worker() -> None:
    """Log as the driver asked for; the first thing that a worker's process does."""
    global _lines
    _lines = Lines(**json.loads(os.environ[WORKERS_VARIABLE]))
    _lines.fields["process"] = "worker"
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(LineFilter(details=_lines.details))
    handler.setFormatter(JsonLines())
    # Not to the root logger alone: Ray Train puts handlers of its own in place of those that are there.
    for logger in map(logging.getLogger, (None, *OWN_LOGGERS)):
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
        logger.propagate = False


class LineFilter(logging.Filter):
    """Lets through what happens from this project's loggers, and warnings from others; with `details` more of both."""

    def __init__(self, *, details: bool) -> None:
        super().__init__()
        self._own, self._others = (logging.DEBUG, logging.INFO) if details else (logging.INFO, logging.WARNING)

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= (self._own if record.name.split(".", 1)[0] in OWN_LOGGERS else self._others)


class JsonLines(logging.Formatter):
    """One object for each record. A record with an attribute `line` is that object already: another process's."""

    def format(self, record: logging.LogRecord) -> str:
        line = getattr(record, "line", None)
        return json.dumps(self._object(record) if line is None else line, ensure_ascii=False)

    def _object(self, record: logging.LogRecord) -> dict[str, Field]:
        line: dict[str, Field] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            **own_fields(),
            "node": platform.node(),
            "pid": record.process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return line
