"""A limit on the pixels that are in memory at once, whatever the number of threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class PixelBudget:
    """Lets pictures be decoded side by side while they fit; a larger one waits until it is alone.

    Args:
        limit: pixels.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._used = limit, 0
        self._changed = threading.Condition()

    @contextmanager
    def share(self) -> Iterator[Callable[[int], None]]:
        """Gives a function that takes pixels, once, as soon as there is room; the end of the block frees them."""
        taken = 0

        def take(pixels: int) -> None:
            nonlocal taken
            with self._changed:
                self._changed.wait_for(lambda: self._used == 0 or self._used + pixels <= self._limit)
                self._used += pixels
                taken = pixels

        try:
            yield take
        finally:
            with self._changed:
                self._used -= taken
                self._changed.notify_all()
