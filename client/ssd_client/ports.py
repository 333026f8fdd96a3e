"""The one check of a port that somebody gave."""

from __future__ import annotations

from .exceptions import InvalidInputError

HIGHEST = 65535


def port_of(value: int | str, name: str) -> int:
    """A port to listen on; 0 = a free one.

    Args:
        value: a number, or its digits.
        name: what the caller calls it, such as --port.

    Raises:
        InvalidInputError: it is none.
    """
    try:
        port = int(value)
    except ValueError:
        port = -1
    if not 0 <= port <= HIGHEST:
        raise InvalidInputError(
            f"{name} is {str(value)[:50]!r}", fix=f"give a number in 0..{HIGHEST}; 0 takes a free port"
        )
    return port
