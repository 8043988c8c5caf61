"""The command line: `blt COMMAND --config FILE key.sub=value ...`, the same as `python -m jobs COMMAND ...`.

Standard output ends with one line of JSON, the command's result; progress and logs go to standard error. The exit
status is 0 for done, 1 for failed or incomplete, 2 for a bad command line or configuration, 130 for Ctrl-C, 141 where
nobody reads the output any more.
"""

import argparse
import difflib
import importlib
import importlib.metadata
import json
import logging
import re
import signal
import sys
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from blt.errors import ConfigError
from jobs.action import Action
from jobs.annotation import field_types
from jobs.configuration import PACKAGED_CONFIGS, find_config, load_config
from jobs.failure import exit_status, mendable, message
from jobs.help import command_help, overview
from jobs.log import log_to
from jobs.record import JobResult
from jobs.standard_output import READER_GONE, discard_output, reader_is_gone

logger = logging.getLogger(__name__)

INTERRUPTED = 130

_SETTING = re.compile(r"[A-Za-z_][\w.-]*=")
"""How a setting begins; a directory with such a name can be given as ./NAME."""


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
    "eval": Command("jobs.evaluate", "bits per byte of a model on a dataset or any text, beside gzip, xz and zstd"),
    "eval harness": Command("jobs.evaluate_harness", "tasks of lm-evaluation-harness; needs the extra eval"),
    "eval characters": Command("jobs.evaluate_characters", "tasks on the letters of words, made from a text; offline"),
    "generate": Command("jobs.generate", "continue a prompt with a trained model"),
    "inspect": Command("jobs.inspect_text", "text in patches over its entropies, in the terminal and as an HTML page"),
    "import": Command("jobs.import_weights", "published weights, of the reference or transformers, as a model of ours"),
    "export": Command("jobs.export_weights", "a model as a directory that transformers loads, with a model card"),
    "bench patch": Command("jobs.bench.patch", "measure patching, its files and their reader; one line of JSON"),
    "bench feed": Command("jobs.bench.feed", "measure the feed of training, its parts and a resume; one line of JSON"),
    "bench goodput": Command(
        "jobs.bench.goodput", "measure what deaths of training workers cost; a JSON line per mode"
    ),
    "bench entropy": Command("jobs.bench.entropy", "measure the entropy pass; a line of JSON"),
    "bench train": Command("jobs.bench.train", "measure forward and backward passes of a BLT; a line of JSON"),
    "bench generate": Command("jobs.bench.generate", "measure generation after a prompt; a line of JSON"),
    "report": Command("jobs.report", "one self-contained HTML page about a run"),
}


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
        name, rest = _split(given)
        program = f"blt {name}"
        return _run(name, rest)
    except ConfigError as error:
        return _fail(program, message(error), exit_status(error))
    except KeyboardInterrupt:
        return _fail(program, "interrupted", INTERRUPTED)


def _split(given: Sequence[str]) -> tuple[str, Sequence[str]]:
    """The command, of one word or two, and what follows it."""
    for num_words in (2, 1):
        name = " ".join(given[:num_words])
        if name in COMMANDS:
            return name, given[num_words:]
    name = given[0]
    close = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.4)
    hint = f'; did you mean "{close[0]}"?' if close else ""
    raise ConfigError(f'"{name}" is not a command{hint} (commands: {", ".join(COMMANDS)})')


def _run(name: str, arguments: Sequence[str]) -> int:
    module = importlib.import_module(COMMANDS[name].module)
    actions: Mapping[str, Action] = getattr(module, "ACTIONS", {})
    own_options = _own_options(module) | _named(key for action in actions.values() for key in action.options)
    flags = {option for option, key in own_options.items() if field_types(module.Config).get(key) is bool}
    options = _parser(name, actions, own_options, flags).parse_intermixed_args(arguments)
    packaged = PACKAGED_CONFIGS / f"{name}.yaml"
    file = find_config(options.config) if options.config else packaged if packaged.is_file() else None
    if options.help:
        print(command_help(name, module, file, actions, own_options, flags))
        return 0
    action = actions[options.action] if options.action else None
    given = {key: getattr(options, f"option.{key}") for key in own_options.values()}
    _check_action_options(actions, action, {key for key, value in given.items() if value is not None})
    settings, places = _with_places(options.settings, getattr(module, "POSITIONAL", ()))
    settings += [f"{key}={value}" for key, value in given.items() if value is not None]
    with log_to(options.log_file, verbose=options.verbose):
        run: Callable[[object], JobResult] = action.run if action else module.run
        config = (action.config if action else None) or module.Config
        return _outcome(f"blt {name}", lambda: run(load_config(config, file, settings, places)))


def _own_options(module: ModuleType) -> dict[str, str]:
    """The module's OPTIONS by name without dashes: key of each. OPTIONS is such a mapping, or the keys alone."""
    given: Mapping[str, str] | Sequence[str] = getattr(module, "OPTIONS", ())
    return dict(given) if isinstance(given, Mapping) else _named(given)


def _named(keys: Iterable[str]) -> dict[str, str]:
    """Keys by the name of their option."""
    return {key.replace("_", "-"): key for key in keys}


def _check_action_options(actions: Mapping[str, Action], chosen: Action | None, given: Collection[str]) -> None:
    """ConfigError for an option of an action that is not the chosen one."""
    for name, action in actions.items():
        for option, key in _named(action.options).items():
            if key in given and key not in (chosen.options if chosen else ()):
                raise ConfigError(f"command line: --{option} goes with --{name}")


def _with_places(arguments: Sequence[str], keys: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The settings, and what is no KEY=VALUE by the `keys` in their order. ConfigError for one too many."""
    settings, places, left = list[str](), dict[str, str](), list(keys)
    for argument in arguments:
        if _SETTING.match(argument) or not keys:
            settings.append(argument)
        elif left:
            places[left.pop(0)] = argument
        else:
            raise ConfigError(
                f'command line: "{argument}" is one argument too many (accepted: {", ".join(keys).upper()})'
            )
    return settings, places


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
    print(f"{program}: error: {reason}", file=sys.stderr, flush=True)
    print(json.dumps({"status": "failed", "error": reason}, ensure_ascii=False), flush=True)
    return status


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with a ConfigError, as everything else does."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"command line: {message} (see {self.prog} --help)")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _parser(name: str, actions: Collection[str], own_options: Mapping[str, str], flags: Container[str]) -> _Parser:
    parser = _Parser(prog=f"blt {name}", add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--log-file", type=Path)
    parser.add_argument("-h", "--help", action="store_true")
    parser.set_defaults(action=None)
    if actions:
        chosen = parser.add_mutually_exclusive_group()
        for action in actions:
            chosen.add_argument(f"--{action}", dest="action", action="store_const", const=action)
    for option, key in own_options.items():
        if option in flags:
            parser.add_argument(f"--{option}", dest=f"option.{key}", action="store_const", const="true")
        else:
            parser.add_argument(f"--{option}", dest=f"option.{key}")
    parser.add_argument("settings", nargs="*")
    return parser
