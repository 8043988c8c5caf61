"""YAML text -> plain values, with scalars as YAML 1.2 reads them and keys given twice refused.

PyYAML follows YAML 1.1, where `1e-3` is text, `on` is true, `010` is eight, `12:30` is 750 and a date is an object.
Here a plain scalar is null, true, false, a decimal number, or the text it is.
"""

import re
from collections.abc import Hashable
from typing import Any

import yaml


class _PlainLoader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag != "tag:yaml.org,2002:merge":
                if key_node.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f'key "{key_node.value}" is given twice', key_node.start_mark
                    )
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_PlainLoader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", list("-+.")),
    ("merge", r"<<", ["<"]),
):
    _PlainLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def parse_yaml(text: str) -> Any:
    """The value of a YAML document: dicts, lists, text, numbers, booleans or None. Raises yaml.YAMLError."""
    return yaml.load(text, Loader=_PlainLoader)
