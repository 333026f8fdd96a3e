"""Frozen dataclasses that check their own values: the tables of spec.toml are made of them.

A field made with `key` carries its default and what it allows, so each default and range is stated once, in the class.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field
from typing import Any, get_type_hints

Floats3 = tuple[float, float, float]
Floats4 = tuple[float, float, float, float]
Names = tuple[str, ...]

_TYPE_NAMES: dict[Any, str] = {
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    Floats3: "a list of 3 numbers",
    Floats4: "a list of 4 numbers",
    Names: "a list of texts",
}
# Types of other modules: how a value becomes one (None: it cannot), by type.
_CONVERTERS: dict[Any, Callable[[Any], Any]] = {}

INT32_MAX = 2**31 - 1


def key(
    default: Any = MISSING,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    above: float = -math.inf,
    choices: tuple[str, ...] = (),
    pattern: str = "",
) -> Any:
    """A field with what it allows: low ≤ value ≤ high, value > above, one of choices, a full match of pattern."""
    rule = {"low": low, "high": high, "above": above, "choices": choices, "pattern": pattern}
    return field(default=default, metadata=rule)


def register(kind: Any, name: str, convert: Callable[[Any], Any]) -> None:
    """Makes a type usable for fields.

    Args:
        kind: the type.
        name: what a value must be, in words: "a list of tables".
        convert: gives the value as this type, or None where it is of another one.
    """
    _TYPE_NAMES[kind] = name
    _CONVERTERS[kind] = convert


class WrongValueError(ValueError):
    """A key and what is wrong with its value; `spec.load` adds file and table."""

    def __init__(self, key: str, problem: str) -> None:
        self.key, self.problem = key, problem
        super().__init__(f"{key} {problem}")


@dataclass(frozen=True)
class Table:
    """One table of spec.toml. Checks its own values, so one made in Python is as right as one that was read.

    Raises:
        ValueError: a value is of the wrong type or out of its range.
    """

    def __post_init__(self) -> None:
        types = get_type_hints(type(self))
        for item in dataclasses.fields(self):
            given, rule = getattr(self, item.name), item.metadata
            value = _converted(given, types[item.name])
            if value is None:
                raise WrongValueError(item.name, f"is {given!r}, but must be {_TYPE_NAMES[types[item.name]]}")
            for part in value if isinstance(value, tuple) else (value,):
                if isinstance(part, (int, float)) and not (
                    rule["low"] <= part <= rule["high"] and part > rule["above"] and math.isfinite(part)
                ):
                    raise WrongValueError(item.name, f"is {given!r}, but must be {in_words(rule)}")
                if rule["choices"] and part not in rule["choices"]:
                    near = difflib.get_close_matches(str(part), rule["choices"], 1)
                    hint = f" (did you mean {near[0]!r}?)" if near else ""
                    choices = ", ".join(rule["choices"])
                    raise WrongValueError(item.name, f"is {part!r}, but must be one of {choices}{hint}")
            if rule["pattern"] and not re.fullmatch(rule["pattern"], value):
                raise WrongValueError(item.name, f"is {value!r}, but must match {rule['pattern']}")
            object.__setattr__(self, item.name, value)


def _converted(value: Any, to: Any) -> Any:
    """The value as the field's type, or None where it is of another type; whole numbers count as numbers."""
    if to in _CONVERTERS:
        return _CONVERTERS[to](value)
    if to in (Floats3, Floats4):
        size = 3 if to == Floats3 else 4
        if not isinstance(value, (list, tuple)) or len(value) != size:
            return None
        numbers = tuple(_converted(number, float) for number in value)
        return None if None in numbers else numbers
    if to == Names:
        good = isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)
        return tuple(value) if good else None
    if to is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value if type(value) is to else None


def in_words(rule: Any) -> str:
    """The allowed range of a field made with `key`, in words."""
    if rule["above"] != -math.inf:
        return f"greater than {rule['above']:g}"
    if rule["high"] == math.inf:
        return f"at least {rule['low']:g}" if rule["low"] != -math.inf else "a finite number"
    return f"in {rule['low']:g}..{rule['high']:g}"
