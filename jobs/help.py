"""The texts of `blt --help` and `blt COMMAND --help`, at most 100 columns wide."""

import inspect
import shutil
import textwrap
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from types import ModuleType

from jobs.action import Action
from jobs.configuration import packaged_configs, read_config_file
from jobs.settings import Setting, describe

_OPTIONS = {
    "--config FILE": "YAML file with settings, or the bare name of a packaged one",
    "KEY=VALUE": "a setting by its dotted key, over those of the file; the value is YAML",
    "--log-file FILE": "write the log, with details, to this file too",
    "--log-format FORMAT": "text, or json: an object on each line, of workers too",
    "--verbose": "details in the log on standard error",
    "--help": "this text",
}


def overview(commands: Mapping[str, str]) -> str:
    """The text of `blt --help`: what there is to call."""
    return "\n".join(
        [
            "usage: blt COMMAND [--config FILE] [KEY=VALUE ...]",
            "",
            "Trains Byte Latent Transformers with Ray, from raw text to held-out bits per byte.",
            "",
            "commands:",
            *_columns(commands),
            "",
            "options of every command:",
            *_columns(_OPTIONS),
            "",
            f"packaged configurations: {', '.join(packaged_configs()) or 'none'}",
            "`blt COMMAND --help` lists the settings of a command. Standard output ends with one line of JSON.",
        ]
    )


def command_help(
    name: str,
    module: ModuleType,
    file: Path | None,
    actions: Mapping[str, Action],
    options: Mapping[str, str],
    flags: Container[str],
) -> str:
    """The text of `blt COMMAND --help`: what it does and every setting, with its default from `file` or the code."""
    shown = {f"--{action}": actions[action].summary for action in actions}
    of_actions = {key: f" with --{name}" for name, action in actions.items() for key in action.options}
    for option, key in options.items():
        value = "" if option in flags else " VALUE"
        shown[f"--{option}{value}"] = f"the same as {key}={value.strip() or 'true'}{of_actions.get(key, '')}"
    places = "".join(f" {key.upper()}" for key in getattr(module, "POSITIONAL", ()))
    rest = f" {module.REST.upper()} ..." if hasattr(module, "REST") else ""
    values = None if file is None else read_config_file(file)
    settings = describe(module.Config, values)
    source = "" if file is None else f", with the defaults of {file}"
    lines = [
        f"usage: blt {name}{places} [--config FILE] [KEY=VALUE ...]{rest}",
        "",
        *_paragraphs(inspect.getdoc(module) or ""),
        "",
        "options:",
        *_columns(shown | _OPTIONS),
        "",
        f"settings{source}:",
        *_settings(settings),
    ]
    known = {setting.key for setting in settings}
    for action, of_action in actions.items():
        if of_action.config is not None:
            further = [setting for setting in describe(of_action.config, values) if setting.key not in known]
            lines += ["", f"settings of --{action}:", *_settings(further)]
    return "\n".join(lines)


def _settings(settings: Sequence[Setting]) -> list[str]:
    lines: list[str] = []
    depth = 0
    # What must be given stands first: keys without a default that are in no section.
    for setting in sorted(settings, key=lambda s: s.default != "required" or "." in s.key or s.type == "section"):
        before, depth = depth, setting.key.count(".")
        lines += [""] if depth < before and setting.type != "section" else []
        lines += _setting(setting)
    return lines


def _setting(setting: Setting) -> list[str]:
    depth = "  " * (1 + setting.key.count("."))
    if setting.type == "section":
        head = f"{setting.key}.*" + (f" = {setting.default}" if setting.default else "")
        return ["", *_wrapped(head, depth), *_wrapped(setting.doc, depth + "    ")]
    value = "(required)" if setting.default == "required" else f"= {setting.default}"
    return [*_wrapped(f"{setting.key} {value}  [{setting.type}]", depth), *_wrapped(setting.doc, depth + "    ")]


def _columns(rows: Mapping[str, str]) -> list[str]:
    width = max(map(len, rows)) + 4
    return [f"  {name:<{width}}{text}" for name, text in rows.items()]


def _paragraphs(text: str) -> list[str]:
    """Filled paragraphs; one that is indented is left as it is."""
    lines: list[str] = []
    for paragraph in text.split("\n\n"):
        lines += ["", *(paragraph.splitlines() if paragraph.startswith(" ") else _wrapped(paragraph, ""))]
    return lines[1:]


def _wrapped(text: str, indent: str) -> list[str]:
    width = min(100, shutil.get_terminal_size((100, 24)).columns)
    return textwrap.wrap(
        text, width, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
