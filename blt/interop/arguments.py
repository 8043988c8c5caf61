"""Another format's arguments, read one by one, so that what was not read can be refused by name.

In: a mapping of plain values. Each reader gives the value of one key, or its default if the key is absent or None.
All errors are ValueErrors that name the key and what is accepted.
"""

from collections.abc import Iterable, Mapping
from typing import TypeVar

Value = TypeVar("Value", str, int)


class Arguments:
    """Reads arguments and notes which were read; `finish` refuses the rest."""

    def __init__(
        self, values: Mapping[str, object], ignored: Iterable[str], fixed: Mapping[str, tuple[object, ...]]
    ) -> None:
        self._values = values
        self._known = set(ignored) | set(fixed)
        for name, accepted in fixed.items():
            if not (self.given(name) is None or _among(values[name], accepted)):
                raise ValueError(f"argument {name} must be {_either(accepted)}, got {values[name]!r}")

    def finish(self, unused: Iterable[str] = ()) -> None:
        """ValueError naming the arguments not read; those that are None or False say nothing and may stay."""
        self._known.update(unused)
        unknown = [
            f"{name}={value!r}"
            for name, value in self._values.items()
            if name not in self._known and value is not None and value is not False
        ]
        if unknown:
            raise ValueError(f"unknown arguments {', '.join(unknown)}")

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.optional_integer(name)
        if value is None:
            value = default
        if value is None:
            raise ValueError(f"argument {name} is missing")
        return value

    def optional_integer(self, name: str) -> int | None:
        value = self.given(name)
        if isinstance(value, float) and value.is_integer():
            return int(value)  # 1024.0, as files write it that other tools have been through
        if value is None or (isinstance(value, int) and not isinstance(value, bool)):
            return value
        raise ValueError(f"argument {name} must be a whole number, got {value!r}")

    def optional_number(self, name: str) -> float | None:
        value = self.given(name)
        if value is None:
            return None
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        raise ValueError(f"argument {name} must be a number, got {value!r}")

    def number(self, name: str, default: float) -> float:
        value = self.optional_number(name)
        return default if value is None else value

    def required_number(self, name: str) -> float:
        value = self.optional_number(name)
        if value is None:
            raise ValueError(f"argument {name} is missing")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.given(name)
        if value is None:
            return default
        if isinstance(value, bool):
            return value
        raise ValueError(f"argument {name} must be true or false, got {value!r}")

    def integers(self, name: str) -> tuple[int, ...]:
        value = self.given(name)
        if value is None:
            return ()
        if isinstance(value, list | tuple) and all(isinstance(item, int) for item in value):
            return tuple(value)
        raise ValueError(f"argument {name} must be a list of whole numbers, got {value!r}")

    def one_of(self, name: str, accepted: tuple[Value, ...], default: Value) -> Value:
        value = self.given(name)
        if value is None:
            return default
        for choice in accepted:
            if _among(value, (choice,)):
                return choice
        raise ValueError(f"argument {name} must be {_either(accepted)}, got {value!r}")

    def given(self, name: str) -> object:
        """The value as it is, None if absent."""
        self._known.add(name)
        return self._values.get(name)


def _among(value: object, accepted: tuple[object, ...]) -> bool:
    return any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in accepted)


def _either(accepted: tuple[object, ...]) -> str:
    return " or ".join(repr(choice) for choice in accepted)
