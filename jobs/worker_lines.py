"""What workers of Ray print, as log lines of the driver: JSON of theirs as it is, everything else put into JSON.

Ray sends the driver what its workers write to their standard output and error, and prints it there behind a prefix.
"""

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher
from ray._private.worker import filter_autoscaler_events

from pipelines.log_line import PRINTED, are_json, own_fields

_RAYS_PRINTER = "ray_print_logs"
_OURS = "blt_log_lines"


@contextlib.contextmanager
def worker_lines() -> Iterator[Callable[[], None]]:
    """Logs what workers print for the length of the block, if lines are JSON; a Ray is begun and ended within it.

    What is yielded is to be called once Ray is initialised: it takes Ray's own printer away.
    """
    if not are_json():
        yield lambda: None
        return
    dispatcher.add_handler(_OURS, _log)
    try:
        yield lambda: dispatcher.remove_handler(_RAYS_PRINTER)
    finally:
        dispatcher.remove_handler(_OURS)


def _log(batch: Mapping[str, Any]) -> None:
    """Lines of one process, as Ray tells of them. Of the autoscaler's, those that are meant for drivers."""
    texts = batch["lines"]
    for text in filter_autoscaler_events(texts) if batch["pid"] == "autoscaler" else texts:
        line = _own_line(text) or _foreign_line(text, batch)
        level = logging.getLevelNamesMapping().get(str(line["level"]), logging.INFO)
        record = logging.makeLogRecord(
            {"name": str(line["logger"]), "levelno": level, "msg": line["message"], "line": line}
        )
        logging.getLogger().handle(record)


def _own_line(text: str) -> dict[str, Any] | None:
    """The line, if a worker of this run wrote it as `pipelines.log_line` does."""
    if not text.startswith("{"):
        return None
    try:
        line = json.loads(text)
    except ValueError:
        return None
    named = ("time", "level", "run", "logger", "message")
    return line if isinstance(line, dict) and all(name in line for name in named) else None


def _foreign_line(text: str, batch: Mapping[str, Any]) -> dict[str, Any]:
    """What a library printed, a traceback, or what Ray says of a worker's death."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "level": "WARNING" if batch["is_err"] else "INFO",
        **own_fields(),
        "process": batch.get("actor_name") or batch.get("task_name") or "worker",
        "node": batch["ip"],
        "pid": int(batch["pid"]) if str(batch["pid"]).isdigit() else batch["pid"],  # or the name of a part of Ray
        "logger": PRINTED,
        "message": text,
    }
