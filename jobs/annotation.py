"""Type annotations of configuration keys: their parts, and how a person reads them."""

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

_NAMES: dict[object, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    Path: "a path",
    type(None): "null",
}
_PLURALS: dict[object, str] = {int: "integers", float: "numbers", str: "texts", Path: "paths"}


def field_types(cls: type) -> dict[str, object]:
    """The resolved annotation of each field that the dataclass's constructor takes, in order."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def members(annotation: object) -> tuple[object, ...]:
    """The members of a union; any other annotation is its own only member."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def dataclass_of(annotation: object) -> type[Any] | None:
    """The dataclass in the annotation, possibly beside null; None if there is none."""
    return next((m for m in members(annotation) if isinstance(m, type) and dataclasses.is_dataclass(m)), None)


def elements_of(annotation: object) -> tuple[object, ...] | None:
    """The element annotations of a tuple or list, `(X, ...)` for any number of X; None for another annotation."""
    if get_origin(annotation) is list:
        return (*get_args(annotation), ...)
    return get_args(annotation) if get_origin(annotation) is tuple else None


def sequence_of(annotation: object) -> tuple[object, ...] | None:
    """The element annotations of the first tuple or list in the annotation, as `elements_of`; None if it has none."""
    return next((elements for m in members(annotation) if (elements := elements_of(m)) is not None), None)


def expected(annotation: object) -> str:
    """What a key of this annotation accepts, in words: "an integer or null"."""
    return " or ".join(_expected_member(m) for m in members(annotation))


def _expected_member(member: object) -> str:
    elements = elements_of(member)
    if elements is not None and elements[-1] is ...:
        section = dataclass_of(elements[0])
        keys = f"sections (keys: {', '.join(field_types(section))})" if section is not None else None
        return f"a list of {keys or _PLURALS.get(elements[0], expected(elements[0]))}"
    if elements is not None:
        return f"a list of {len(elements)} ({', '.join(map(expected, elements))})"
    if get_origin(member) is Literal:
        return f"one of {', '.join(v if isinstance(v, str) else json.dumps(v) for v in get_args(member))}"
    if isinstance(member, type) and dataclasses.is_dataclass(member):
        return f"a section (keys: {', '.join(field_types(member))})"
    if get_origin(member) is dict:
        return "a section"
    return _NAMES.get(member, getattr(member, "__name__", str(member)))


def type_name(annotation: object) -> str:
    """The annotation in the short form of a listing: "integer", "a | b | c", "[text, ...] | null"."""
    return " | ".join(_short_member(m) for m in members(annotation))


def _short_member(member: object) -> str:
    elements = elements_of(member)
    if elements is not None:
        return f"[{', '.join('...' if e is ... else type_name(e) for e in elements)}]"
    if get_origin(member) is Literal:
        return " | ".join(v if isinstance(v, str) else json.dumps(v) for v in get_args(member))
    if get_origin(member) is dict or dataclass_of(member) is not None:
        return "section"
    return _NAMES.get(member, getattr(member, "__name__", str(member))).removeprefix("an ").removeprefix("a ")
