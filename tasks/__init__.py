"""The tasks of `./invoke`, by area: each is thin and calls one function of build/, client/ or perf/.

Imports of those live inside the tasks, so that `./invoke --list` answers at once.
"""

import io
import sys
from typing import Any

from invoke.collection import Collection
from invoke.exceptions import ParseError
from invoke.parser.argument import Argument

from . import building, measuring, project, serving

_set_value = Argument.set_value


def _or_say(argument: Argument, value: Any, cast: bool = True) -> None:
    """Invoke itself answers a word in place of a number with a stack trace."""
    try:
        _set_value(argument, value, cast)
    except ValueError:
        kind = "a whole number" if argument.kind is int else "a number"
        raise ParseError(f"--{str(argument.name).replace('_', '-')} is {value!r}\nwhat to do: give {kind}") from None


Argument.set_value = _or_say  # type: ignore[assignment]

for stream in (sys.stdout, sys.stderr):  # a terminal whose encoding lacks a character must not end a task
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")

namespace = Collection()
for area in (building, serving, measuring, project):
    for one in Collection.from_module(area).tasks.values():
        namespace.add_task(one)
