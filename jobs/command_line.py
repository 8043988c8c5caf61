"""The command line: `blt COMMAND --config FILE key.sub=value ...`, the same as `python -m jobs COMMAND ...`.

Standard output ends with one line of JSON, the command's result; progress and logs go to standard error. The exit
status is 0 for done, 1 for failed or incomplete, 2 for a bad command line or configuration, 130 for Ctrl-C, 141 where
nobody reads the output any more.
"""

import importlib.metadata
import json
import logging
import signal
import sys
from collections.abc import Callable, Sequence

from blt.errors import ConfigError
from jobs.cluster.submission import Submission
from jobs.configuration import to_plain
from jobs.failure import exit_status, mendable, message
from jobs.help import overview
from jobs.invocation import COMMANDS, Call, split_command, understand
from jobs.log import log_to
from jobs.record import JobResult
from jobs.standard_output import READER_GONE, discard_output, reader_is_gone
from pipelines.log_line import add_fields, are_json

logger = logging.getLogger(__name__)

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status. Arguments are those after the program's name."""
    try:
        status = _main(arguments)
        sys.stdout.flush()
        return status
    except (BrokenPipeError, SystemExit) as error:
        if not reader_is_gone(error):
            raise
        discard_output()
        return READER_GONE


def _main(arguments: Sequence[str] | None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    program = "blt"
    try:
        if not given or given[0] in ("-h", "--help", "help"):
            print(overview({name: command.summary for name, command in COMMANDS.items()}))
            return 0 if given else 2
        if given[0] == "--version":
            print(f"blt-ray {importlib.metadata.version('blt-ray')}")
            return 0
        name, rest = split_command(given)
        program = f"blt {name}"
        return _run(name, rest)
    except ConfigError as error:
        return _fail(program, message(error), exit_status(error))
    except KeyboardInterrupt as error:
        return _fail(program, _first_line(error) or "interrupted", INTERRUPTED)


def _run(name: str, arguments: Sequence[str]) -> int:
    call = understand(name, arguments)
    if call.help is not None:
        print(call.help)
        return 0
    with log_to(call.log_file, verbose=call.verbose, log_format=call.log_format):
        return _outcome(f"blt {name}", lambda: _work(call))


def _work(call: Call) -> JobResult:
    config = call.load()
    submission = Submission(command=call.name, action=call.action, config=to_plain(config))
    add_fields(run=submission.run, command=call.name)
    return call.run(config)


def _outcome(program: str, work: Callable[[], JobResult]) -> int:
    """Does the work, prints its result as the last line of standard output, and gives the exit status."""
    try:
        result = work()
    except SystemExit as stop:
        if reader_is_gone(stop):
            raise
        # SIGTERM in a Ray session has its own code; on Ctrl-C, Ray Train's signal handler leaves with 0.
        terminated = stop.code == 128 + signal.SIGTERM
        return _fail(program, *("terminated", 128 + signal.SIGTERM) if terminated else ("interrupted", INTERRUPTED))
    except KeyboardInterrupt as error:
        return _fail(program, _first_line(error) or "interrupted", INTERRUPTED)
    except Exception as error:
        if reader_is_gone(error):
            raise
        cause = mendable(error)
        if cause is None:
            logger.exception("failed unexpectedly")
            return _fail(program, f"{type(error).__name__}: {_first_line(error)}", 1)
        logger.debug("failed", exc_info=error)
        return _fail(program, message(cause), exit_status(cause))
    sys.stderr.flush()
    print(result.to_json(), flush=True)
    return 1 if result.status == "incomplete" else 0


def _fail(program: str, reason: str, status: int) -> int:
    if are_json():
        logger.error("%s: error: %s", program, reason)
    else:
        print(f"{program}: error: {reason}", file=sys.stderr, flush=True)
    print(json.dumps({"status": "failed", "error": reason}, ensure_ascii=False), flush=True)
    return status


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]
