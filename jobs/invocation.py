"""A command line understood: which command, which of its actions, with what configuration; nothing is done yet.

In: the arguments after `blt`. Out: a `Call`, or a ConfigError of one line.
"""

import argparse
import difflib
import importlib
import re
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NoReturn, get_args

from blt.errors import ConfigError
from jobs.action import Action
from jobs.annotation import field_types
from jobs.cluster.places import refuse_credentials_in
from jobs.configuration import PACKAGED_CONFIGS, find_config, load_config, to_plain
from jobs.help import command_help
from jobs.log import LogFormat
from jobs.record import JobResult

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
    "submit": Command("jobs.cluster.submit", "run a command as a job on a Ray cluster, through its job server"),
    "jobs": Command("jobs.cluster.jobs", "the jobs of a cluster"),
    "logs": Command("jobs.cluster.logs", "what a job has printed, and what it prints from now on"),
    "stop": Command("jobs.cluster.stop", "end a job"),
}


@dataclass(frozen=True, kw_only=True)
class Call:
    """A command with all that was given to it."""

    name: str
    module: ModuleType
    action: str | None
    """Name of the action that is asked for instead of the command's work."""
    help: str | None
    """The command's help, if that is asked for; then nothing else of the call was looked at."""
    verbose: bool
    log_file: Path | None
    log_format: LogFormat
    file: Path | None
    """The configuration file."""
    settings: Sequence[str]
    """Overrides `key=value`, those given as options too."""
    given: Mapping[str, object]
    """Values by key that are no YAML: what was given by its place, and for a command that takes another the rest."""

    @property
    def run(self) -> Callable[[object], JobResult]:
        """What does it, given the configuration."""
        run: Callable[[object], JobResult] = self._action.run if self._action else self.module.run
        return run

    def load(self) -> object:
        """The configuration. ConfigError, for a URI with credentials in it too: nothing is done with it, nor told."""
        cls = (self._action.config if self._action else None) or self.module.Config
        config: object = load_config(cls, self.file, self.settings, self.given)
        refuse_credentials_in(self.name, to_plain(config))
        return config

    @property
    def _action(self) -> Action | None:
        actions: Mapping[str, Action] = getattr(self.module, "ACTIONS", {})
        return actions[self.action] if self.action else None


def split_command(given: Sequence[str]) -> tuple[str, Sequence[str]]:
    """The command, of one word or two, and what follows it. ConfigError for none of that name."""
    for num_words in (2, 1):
        name = " ".join(given[:num_words])
        if name in COMMANDS:
            return name, given[num_words:]
    name = given[0]
    close = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.4)
    hint = f'; did you mean "{close[0]}"?' if close else ""
    raise ConfigError(f'"{name}" is not a command{hint} (commands: {", ".join(COMMANDS)})')


def understand(name: str, arguments: Sequence[str]) -> Call:
    """The call of command `name` with the arguments that follow it."""
    module = importlib.import_module(COMMANDS[name].module)
    actions: Mapping[str, Action] = getattr(module, "ACTIONS", {})
    own_options = _own_options(module) | _named(key for action in actions.values() for key in action.options)
    flags = {option for option, key in own_options.items() if field_types(module.Config).get(key) is bool}
    parser = _parser(name, actions, own_options, flags)
    rest_key: str | None = getattr(module, "REST", None)
    own, rest = _before_command(arguments, own_options.keys() - flags) if rest_key else (arguments, ())
    options = parser.parse_intermixed_args(own)
    packaged = PACKAGED_CONFIGS / f"{name}.yaml"
    file = find_config(options.config) if options.config else packaged if packaged.is_file() else None
    given = {key: getattr(options, f"option.{key}") for key in own_options.values()}
    help_text = command_help(name, module, file, actions, own_options, flags) if options.help else None
    if help_text is None:
        action = actions[options.action] if options.action else None
        _check_action_options(actions, action, {key for key, value in given.items() if value is not None})
    settings, places = _with_places(options.settings, getattr(module, "POSITIONAL", ()))
    return Call(
        name=name,
        module=module,
        action=options.action,
        help=help_text,
        verbose=options.verbose,
        log_file=options.log_file,
        log_format=options.log_format,
        file=file,
        settings=settings + [f"{key}={value}" for key, value in given.items() if value is not None],
        given={**places, **({rest_key: list(rest)} if rest_key and rest else {})},
    )


def _before_command(arguments: Sequence[str], with_value: Collection[str]) -> tuple[Sequence[str], Sequence[str]]:
    """The arguments before the first one that is neither an option, nor an option's value, nor KEY=VALUE; the rest."""
    takes_next = False
    options = {f"--{option}" for option in (*with_value, "config", "log-file", "log-format")}
    for index, argument in enumerate(arguments):
        if not takes_next and not argument.startswith("-") and not _SETTING.match(argument):
            return arguments[:index], arguments[index:]
        takes_next = not takes_next and argument in options
    return arguments, ()


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


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with a ConfigError, as everything else does."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"command line: {message} (see {self.prog} --help)")


def _parser(name: str, actions: Collection[str], own_options: Mapping[str, str], flags: Container[str]) -> _Parser:
    parser = _Parser(prog=f"blt {name}", add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--log-file", type=Path)
    parser.add_argument("--log-format", choices=get_args(LogFormat), default="text")
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
