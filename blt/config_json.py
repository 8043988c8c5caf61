"""Nested frozen dataclasses as plain JSON values, and back, strictly: what was written is what is read, or an error.

In: a configuration (`BLTConfig`, `EntropyModelConfig`, `PatchRule`, ...). Out: JSON values and one canonical text.
Fields may be int, float, bool, str, Literal, tuple[X, ...], another dataclass, or any of these or None. Infinite
numbers, which JSON does not have, are written as the texts "inf" and "-inf".
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Config = TypeVar("Config")
Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]

ADDED_LATER: Mapping[str, bool] = {"may_be_missing": True}
"""Metadata of a field that files may lack since they are older than it: it then has its default."""
ONLY_IF_GIVEN: Mapping[str, bool] = {**ADDED_LATER, "left_out_at_default": True}
"""The same of a field that is not written at its default either, so that older fingerprints and names stay."""

_INFINITIES = {"inf": math.inf, "-inf": -math.inf}


def to_json(value: object) -> Json:
    """The JSON value of a configuration or of one of its fields. TypeError for a type a configuration may not hold."""
    if is_dataclass(value) and not isinstance(value, type):
        return {name: to_json(item) for name, item in written_fields(value)}
    if isinstance(value, tuple | list):
        return [to_json(item) for item in value]
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a configuration cannot hold {type(value).__name__}: {value!r}")


def written_fields(config: object) -> Iterator[tuple[str, Any]]:
    """Name and value of each field of a dataclass but those that are ONLY_IF_GIVEN and have their default."""
    for field in fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        if not (field.metadata.get("left_out_at_default") and value == field.default):
            yield field.name, value


def canonical_text(value: object) -> str:
    """One line of JSON that is equal for equal configurations: sorted keys, no spaces."""
    return json.dumps(to_json(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def from_json(kind: type[Config], value: object, key: str) -> Config:
    """The `kind` that `to_json` made `value` of; `key` is the dotted place of `value` in its file.

    ValueError, naming the key, if a key is unknown or missing, a value has another type, or the dataclass refuses it.
    """
    values = json_object(value, key)
    types = get_type_hints(kind)
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    for name in values:
        if name not in names:
            raise ValueError(f"unknown key {key}.{name}; known are {', '.join(names)}")
    for field in fields(kind):  # type: ignore[arg-type]
        if field.name not in values and not field.metadata.get("may_be_missing"):
            raise ValueError(f"key {key}.{field.name} is missing")
    arguments = {name: _parsed(types[name], value, f"{key}.{name}") for name, value in values.items()}
    try:
        return kind(**arguments)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def json_object(value: object, key: str) -> Mapping[str, object]:
    """`value` if it is a JSON object; ValueError naming `key` otherwise."""
    if not isinstance(value, dict):
        raise ValueError(f"key {key} must be an object, got {_told(value)}")
    return value


def _parsed(expected: Any, value: object, key: str) -> Any:
    """`value` as the annotated type `expected`: tuples, nested dataclasses and floats restored."""
    if get_origin(expected) in (Union, UnionType):
        return _parsed_optional(get_args(expected), value, key)
    if get_origin(expected) is Literal:
        if value in get_args(expected) and isinstance(value, str):
            return value
        raise ValueError(f"key {key} must be one of {', '.join(get_args(expected))}, got {_told(value)}")
    if get_origin(expected) is tuple:
        if not isinstance(value, list):
            raise ValueError(f"key {key} must be a list, got {_told(value)}")
        return tuple(_parsed(get_args(expected)[0], item, f"{key}[{i}]") for i, item in enumerate(value))
    if is_dataclass(expected):
        return from_json(expected, value, key)  # type: ignore[arg-type]
    return _parsed_scalar(expected, value, key)


def _parsed_optional(choices: tuple[Any, ...], value: object, key: str) -> Any:
    if value is None and NoneType in choices:
        return None
    (inner,) = (choice for choice in choices if choice is not NoneType)
    return _parsed(inner, value, key)


def _parsed_scalar(expected: Any, value: object, key: str) -> Any:
    if expected is float and isinstance(value, str) and value in _INFINITIES:
        return _INFINITIES[value]
    if expected is float and type(value) is int:
        return float(value)
    if type(value) is not expected:
        raise ValueError(f"key {key} must be {expected.__name__}, got {_told(value)}")
    return value


def _told(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
