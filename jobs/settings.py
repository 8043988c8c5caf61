"""The keys of a configuration dataclass as a person reads them: dotted key, type, default, what it means.

What a key means is the string literal under its field; what a section means, the docstring of its class.
"""

import ast
import dataclasses
import inspect
import itertools
import json
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from jobs.annotation import dataclass_of, field_types, sequence_of, type_name
from jobs.configuration import to_plain

_NOT_GIVEN: Any = object()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """One key. A section has the type "section", and its keys follow it; those of a list's sections as LIST[].KEY."""

    key: str
    type: str
    default: str
    doc: str


def describe(cls: type, values: Mapping[str, Any] | None = None) -> list[Setting]:
    """Every key of the dataclass, nested ones too, in order; `values`, as read from YAML, go before its defaults."""
    return list(_settings(cls, values or {}, _NOT_GIVEN, ""))


def _settings(cls: type, values: Mapping[str, Any], default: Any, prefix: str) -> Iterator[Setting]:
    docs = _field_docs(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name, annotation in field_types(cls).items():
        inner = _default(fields[name], default)
        given = values.get(name, _NOT_GIVEN)
        section = dataclass_of(annotation)
        shown = _shown(inner if given is _NOT_GIVEN else given)
        if section is None:
            yield Setting(key=prefix + name, type=type_name(annotation), default=shown, doc=docs.get(name, ""))
            if (element := _element_section(annotation)) is not None:
                yield from _settings(element, {}, _NOT_GIVEN, f"{prefix}{name}[].")
            continue
        shown = shown if shown in ("null", "required") else ""
        doc = docs.get(name) or _one_line(inspect.getdoc(section) or "")
        yield Setting(key=prefix + name, type="section", default=shown, doc=doc)
        nested = given if isinstance(given, dict) else {}
        yield from _settings(
            section, nested, inner if dataclasses.is_dataclass(inner) else _NOT_GIVEN, f"{prefix}{name}."
        )


def _element_section(annotation: object) -> type | None:
    """The dataclass of which the annotation is a list of any length; None for another annotation."""
    elements = sequence_of(annotation)
    return dataclass_of(elements[0]) if elements and elements[-1] is ... else None


def _default(field: "dataclasses.Field[Any]", section: Any) -> Any:
    """The field's value in the default of its section, if that has one, else the field's own default."""
    if section is not _NOT_GIVEN:
        return getattr(section, field.name)
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return _NOT_GIVEN if field.default is dataclasses.MISSING else field.default


def _shown(value: Any) -> str:
    if value is _NOT_GIVEN:
        return "required"
    plain = to_plain(value)
    return plain if isinstance(plain, str) and plain else json.dumps(plain, ensure_ascii=False)


def _field_docs(cls: type) -> dict[str, str]:
    """Field name -> the string literal under it, base classes first; nothing for a class without source text."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError):
            continue
        body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
        for statement, below in itertools.pairwise(body):
            if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
                continue
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                docs[statement.target.id] = _one_line(str(below.value.value))
    return docs


def _one_line(doc: str) -> str:
    return " ".join(doc.split())
