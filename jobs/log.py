"""Where log lines go: to standard error, and to a file if one is asked for.

A line is `time level logger message key=value ...`. Both take what happens from this project's loggers, and warnings
from others; `verbose` and the file take the details too.
"""

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from blt.errors import ConfigError

OWN_LOGGERS = ("blt", "pipelines", "jobs")
_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"


class _StandardErrorHandler(logging.StreamHandler[TextIO]):
    """Writes to what sys.stderr is at the time: a progress bar stands in for it to keep log lines above itself."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, value: TextIO) -> None:
        raise AttributeError("the stream is always sys.stderr")


@contextlib.contextmanager
def log_to(file: Path | None, *, verbose: bool) -> Iterator[None]:
    """Sends log lines on for the length of the block. ConfigError if the file cannot be written."""
    handlers = [_handler(_StandardErrorHandler(), details=verbose, time_format="%H:%M:%S")]
    if file is not None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            handlers.append(_handler(logging.FileHandler(file, encoding="utf-8"), details=True))
        except OSError as error:
            raise ConfigError(f"--log-file {file}: cannot be written: {error.strerror}") from error
    root, level = logging.getLogger(), logging.getLogger().level
    root.setLevel(logging.DEBUG)
    for handler in handlers:
        root.addHandler(handler)
    try:
        yield
    finally:
        root.setLevel(level)
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()


def _handler(handler: logging.Handler, *, details: bool, time_format: str | None = None) -> logging.Handler:
    own, others = (logging.DEBUG, logging.INFO) if details else (logging.INFO, logging.WARNING)
    handler.addFilter(lambda record: record.levelno >= (own if _is_own(record.name) else others))
    handler.setFormatter(logging.Formatter(_FORMAT, time_format))
    return handler


def _is_own(name: str) -> bool:
    return name.split(".", 1)[0] in OWN_LOGGERS
