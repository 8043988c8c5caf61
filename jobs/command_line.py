"""The command line: `blt COMMAND --config FILE key.sub=value ...`, the same as `python -m jobs COMMAND ...`.

Standard output ends with one line of JSON, the command's result; progress and logs go to standard error. The exit
status is 0 for done, 1 for failed, 2 for a bad command line or configuration, 130 for Ctrl-C.
"""

import argparse
import difflib
import importlib
import importlib.metadata
import json
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from blt.errors import ConfigError
from jobs.configuration import PACKAGED_CONFIGS, find_config, load_config
from jobs.failure import exit_status, mendable, message
from jobs.help import command_help, overview
from jobs.log import log_to
from jobs.record import JobResult

logger = logging.getLogger(__name__)

INTERRUPTED = 130


@dataclass(frozen=True)
class Command:
    """The module that does it, imported only when it is called, and its line in `blt --help`."""

    module: str
    summary: str


COMMANDS: dict[str, Command] = {
    "quickstart": Command("jobs.quickstart", "everything below in one go, on the text shipped with the sources"),
    "shard": Command("jobs.shard", "text files to shards of documents, split into train and valid"),
    "train-entropy": Command("jobs.train_entropy", "train the small byte model whose entropies place the patches"),
    "calibrate": Command("jobs.calibrate", "find the entropy threshold that gives a mean patch size"),
    "patch": Command("jobs.patch", "cut documents into patches: a dataset of bytes and patch starts"),
    "train": Command("jobs.train", "train a Byte Latent Transformer on a patch dataset"),
    "eval": Command("jobs.evaluate", "bits per byte of a model on held-out documents, beside gzip and xz"),
    "generate": Command("jobs.generate", "continue a prompt with a trained model"),
    "report": Command("jobs.report", "one self-contained HTML page about a run"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status. Arguments are those after the program's name."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    program = "blt"
    try:
        if not given or given[0] in ("-h", "--help", "help"):
            print(overview({name: command.summary for name, command in COMMANDS.items()}))
            return 0 if given else 2
        if given[0] == "--version":
            print(f"blt-ray {importlib.metadata.version('blt-ray')}")
            return 0
        command = _command(given[0])
        program = f"blt {given[0]}"
        return _run(given[0], command, given[1:])
    except ConfigError as error:
        return _fail(program, message(error), exit_status(error))
    except KeyboardInterrupt:
        return _fail(program, "interrupted", INTERRUPTED)


def _command(name: str) -> Command:
    if name in COMMANDS:
        return COMMANDS[name]
    close = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.4)
    hint = f'; did you mean "{close[0]}"?' if close else ""
    raise ConfigError(f'"{name}" is not a command{hint} (commands: {", ".join(COMMANDS)})')


def _run(name: str, command: Command, arguments: Sequence[str]) -> int:
    options = _parser(name).parse_intermixed_args(arguments)
    module = importlib.import_module(command.module)
    packaged = PACKAGED_CONFIGS / f"{name}.yaml"
    file = find_config(options.config) if options.config else packaged if packaged.is_file() else None
    if options.help:
        print(command_help(name, module, file))
        return 0
    with log_to(options.log_file, verbose=options.verbose):
        run: Callable[[object], JobResult] = module.run
        return _outcome(f"blt {name}", lambda: run(load_config(module.Config, file, options.settings)))


def _outcome(program: str, work: Callable[[], JobResult]) -> int:
    """Does the work, prints its result as the last line of standard output, and gives the exit status."""
    try:
        result = work()
    except SystemExit as stop:
        # SIGTERM in a Ray session has its own code; on Ctrl-C, Ray Train's signal handler leaves with 0.
        terminated = stop.code == 128 + signal.SIGTERM
        return _fail(program, *("terminated", 128 + signal.SIGTERM) if terminated else ("interrupted", INTERRUPTED))
    except Exception as error:
        cause = mendable(error)
        if cause is None:
            logger.exception("failed unexpectedly")
            return _fail(program, f"{type(error).__name__}: {_first_line(error)}", 1)
        logger.debug("failed", exc_info=error)
        return _fail(program, message(cause), exit_status(cause))
    sys.stderr.flush()
    print(result.to_json(), flush=True)
    return 0


def _fail(program: str, reason: str, status: int) -> int:
    print(f"{program}: error: {reason}", file=sys.stderr, flush=True)
    print(json.dumps({"status": "failed", "error": reason}, ensure_ascii=False), flush=True)
    return status


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with a ConfigError, as everything else does."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"command line: {message} (see {self.prog} --help)")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _parser(name: str) -> _Parser:
    parser = _Parser(prog=f"blt {name}", add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--log-file", type=Path)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("settings", nargs="*")
    return parser
