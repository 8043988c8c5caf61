"""From a YAML file and dotted overrides to one typed, frozen configuration.

In: a dataclass that says which keys there are, an optional YAML file, overrides such as `optimiser.lr=1e-3`.
Out: an instance of the dataclass, or a ConfigError of one line that names the file or the command line, the dotted key,
the value and what is accepted. The dataclasses are plain ones; pydantic checks them from outside, so that `blt` and
`pipelines` need not know it. A section that is given in part keeps the other values of its default.
"""

import dataclasses
import difflib
import enum
import itertools
import json
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml

from blt.config_json import written_fields
from blt.errors import ConfigError
from jobs.annotation import dataclass_of, elements_of, expected, field_types, members, sequence_of
from jobs.yaml_values import parse_yaml

T = TypeVar("T")

PACKAGED_CONFIGS = Path(__file__).parent / "configs"

_OVERRIDE = re.compile(r"(?P<key>[A-Za-z_][\w-]*(?:\.[A-Za-z_][\w-]*)*)=(?P<text>.*)", re.DOTALL)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Origin:
    """Where values came from: says in an error whether the file or the command line is to be mended."""

    file: Path | None
    overrides: tuple[str, ...]

    def error(self, key: str, message: str) -> ConfigError:
        above = any(key == o or key.startswith((f"{o}.", f"{o}[")) for o in self.overrides)
        below = any(not key or o.startswith(f"{key}.") for o in self.overrides)
        places = [str(self.file)] if self.file and not above else []
        places += ["command line"] if above or below else []
        return ConfigError(f"{' and '.join(places)}: {message}" if places else message)


def packaged_configs() -> list[str]:
    """The bare names of the configurations that come with the commands."""
    return sorted(file.stem for file in PACKAGED_CONFIGS.glob("*.yaml"))


def find_config(name: str) -> Path:
    """The file at the path `name`, or the packaged configuration of that bare name. ConfigError if there is none."""
    path, packaged = Path(name), PACKAGED_CONFIGS / f"{name.removesuffix('.yaml')}.yaml"
    if path.is_file():
        return path
    if path.name == name and packaged.is_file():
        return packaged
    names = ", ".join(packaged_configs())
    what = "is a directory" if path.is_dir() else "does not exist"
    raise ConfigError(f'configuration file "{name}" {what}' + (f" (packaged: {names})" if names else ""))


def read_config_file(file: Path) -> dict[str, Any]:
    """The mapping in the YAML file, empty for an empty file. ConfigError names the file and line of what is wrong."""
    try:
        values = parse_yaml(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: is not UTF-8 text (byte {error.start})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: is not valid YAML: {_yaml_problem(error)}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: expected `key: value` lines, got {_shown(values)}")
    return values


def load_config(
    cls: type[T], file: Path | str | None, overrides: Sequence[str] = (), given: Mapping[str, object] | None = None
) -> T:
    """The configuration of class `cls` from the file, if any, with `key.sub=value` overrides laid over it.

    Override values are YAML; the text of a key that holds text is taken as it stands, unless it is null or begins with
    a quote. `given` go before all else: values by key, which are never read as YAML. Relative paths are left alone.
    """
    values = read_config_file(path) if (path := Path(file) if file is not None else None) else {}
    keys = [_apply_override(cls, values, override) for override in overrides]
    values |= given or {}
    keys += given or {}
    origin = _Origin(file=path, overrides=tuple(keys))
    prepared = _prepare(cls, values, None, "", origin)
    try:
        return typing.cast(T, _checker(cls).model_validate({"config": prepared}).config)  # type: ignore[attr-defined]
    except pydantic.ValidationError as error:
        raise _config_error(cls, error, origin) from error


def to_plain(config: object) -> Any:
    """The configuration as what JSON can hold: sections as dicts, tuples as lists, paths and enums as their values."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {name: to_plain(value) for name, value in written_fields(config)}
    if isinstance(config, Mapping):
        return {str(key): to_plain(value) for key, value in config.items()}
    if isinstance(config, list | tuple | set | frozenset):
        return [to_plain(value) for value in config]
    if isinstance(config, enum.Enum):
        return to_plain(config.value)
    return str(config) if isinstance(config, Path) else config


def _checker(cls: type) -> type[pydantic.BaseModel]:
    # A plain dataclass inherits the settings of the model around it, nested ones too; TypeAdapter refuses to pass them.
    # Its own error, which a detailed log shows, would tell all values, a URI with a password among them.
    strict = pydantic.ConfigDict(extra="forbid", coerce_numbers_to_str=True, hide_input_in_errors=True)
    return pydantic.create_model("Checker", __config__=strict, config=(cls, ...))


def _apply_override(cls: type, values: dict[str, Any], override: str) -> str:
    """Puts the override's value into `values` and returns its dotted key."""
    match = _OVERRIDE.fullmatch(override)
    if match is None:
        raise ConfigError(f'command line: "{override}" is not a setting; settings are given as KEY=VALUE')
    key, text = match["key"], match["text"]
    *sections, last = key.split(".")
    for depth, section in enumerate(sections, start=1):
        if values.get(section) is None:
            values[section] = {}
        values = values[section]
        if not isinstance(values, dict):
            raise ConfigError(f'command line: key "{key}": "{".".join(sections[:depth])}" is a value, not a section')
    values[last] = _override_value(_locate(cls, (*sections, last))[1], key, text)
    return key


def _override_value(annotation: object, key: str, text: str) -> Any:
    kinds = [m for m in members(annotation) if m is not type(None)]
    holds_text = len(kinds) == 1 and (kinds[0] is str or (elements_of(kinds[0]) == (str, ...) and text[:1] != "["))
    is_null = text == "null" and type(None) in members(annotation)
    if holds_text and not is_null and text[:1] not in ("'", '"'):
        return text
    try:
        return parse_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(
            f'command line: key "{key}": {_shown(text)} is not valid YAML: {_yaml_problem(error)}'
        ) from error


def _prepare(annotation: object, value: Any, default: object, key: str, origin: _Origin) -> Any:
    """What pydantic cannot say: defaults of a section given in part, one value as a list of one, true is no number."""
    kinds = members(annotation)
    if isinstance(value, bool) and bool not in kinds and (int in kinds or float in kinds):
        raise origin.error(key, f'key "{key}": expected {expected(annotation)}, got {_shown(value)}')
    section = dataclass_of(annotation)
    if section is not None and isinstance(value, dict):
        return _prepare_section(section, value, default, key, origin)
    if (elements := sequence_of(annotation)) is None:
        return value
    alone = len([kind for kind in kinds if kind is not type(None)]) == 1
    if alone and elements[-1] is ... and value is not None and not isinstance(value, list | dict):
        value = [value]
    if isinstance(value, list):
        types = itertools.repeat(elements[0]) if elements[-1] is ... else iter(elements)
        inner = zip(value, itertools.chain(types, itertools.repeat(object)), strict=False)
        return [_prepare(t, v, None, f"{key}[{i}]", origin) for i, (v, t) in enumerate(inner)]
    return value


def _prepare_section(
    section: type, value: dict[Any, Any], default: object, key: str, origin: _Origin
) -> dict[str, Any]:
    prepared: dict[str, Any] = {}
    types, defaults = field_types(section), _field_defaults(section, default)
    for name, inner in value.items():
        dotted = f"{key}.{name}" if key else str(name)
        if not isinstance(name, str):
            raise origin.error(dotted, f'key "{dotted}": keys are names, got {_shown(name)}')
        prepared[name] = _prepare(types.get(name, object), inner, defaults.get(name), dotted, origin)
    given = {} if default is None else defaults
    return {**given, **prepared}


def _field_defaults(section: type, default: object) -> dict[str, object]:
    """What each key holds when it is not given: its value in the default section if there is one, else its default."""
    found: dict[str, object] = {}
    for field in dataclasses.fields(section):
        if default is not None:
            found[field.name] = getattr(default, field.name)
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
        elif field.default is not dataclasses.MISSING:
            found[field.name] = field.default
    return found


def _locate(cls: type, path: Sequence[int | str]) -> tuple[str, object]:
    """The dotted key and the annotation at `path`. Parts that name a member of a union are no part of the key."""
    key, annotation = "", typing.cast(object, cls)
    for part in path:
        section, elements = dataclass_of(annotation), sequence_of(annotation)
        if isinstance(part, int) and elements:
            annotation = elements[0] if elements[-1] is ... else elements[part] if part < len(elements) else object
            key = f"{key}[{part}]"
        elif section is not None and part in field_types(section):
            annotation, key = field_types(section)[str(part)], f"{key}.{part}" if key else str(part)
        elif section is not None or annotation is object:
            annotation, key = object, f"{key}.{part}" if key else str(part)
    return key, annotation


def _config_error(cls: type, error: pydantic.ValidationError, origin: _Origin) -> ConfigError:
    # One line, one thing to mend; an unknown key first, for a misspelt required key is reported as missing as well.
    first = min(error.errors(), key=lambda e: e["type"] != "unexpected_keyword_argument")
    path, kind, value = first["loc"][1:], first["type"], first["input"]
    key, annotation = _locate(cls, path)
    if kind == "unexpected_keyword_argument":
        known = field_types(dataclass_of(_locate(cls, path[:-1])[1]) or cls)
        return origin.error(key, f'key "{key}" is not known{_nearest(str(path[-1]), list(known))}')
    if kind == "missing" and not isinstance(path[-1], int):
        return origin.error(key, f'key "{key}" is missing: {expected(annotation)} is required')
    if kind == "value_error":
        return origin.error(key, _refusal(key, annotation, str(first["ctx"]["error"])))
    if kind in ("missing", "too_long", "too_short"):
        key, annotation = re.sub(r"\[\d+\]$", "", key), _locate(cls, path[:-1] if kind == "missing" else path)[1]
    return origin.error(key, f'key "{key}": expected {expected(annotation)}, got {_shown(value)}')


def _refusal(key: str, annotation: object, reason: str) -> str:
    """The message of a section that refuses its values, with the key that the reason begins with, if any."""
    section, (word, _, rest) = dataclass_of(annotation), reason.partition(" ")
    if section is not None and word in field_types(section):
        return f'key "{key}.{word}" {rest}' if key else f'key "{word}" {rest}'
    return f'key "{key}": {reason}' if key else reason


def _nearest(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f'; did you mean "{close[0]}"?' if close else ""
    return f"{hint} (accepted: {', '.join(names)})"


def _yaml_problem(error: yaml.YAMLError) -> str:
    problem, mark = getattr(error, "problem", None) or str(error), getattr(error, "problem_mark", None)
    where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark is not None else ""
    return " ".join(problem.split()) + where


def _shown(value: object) -> str:
    text = re.sub(r"://[^/\s]*@", "://...@", json.dumps(value, default=str, ensure_ascii=False))
    return text if len(text) <= 60 else f"{text[:57]}..."
