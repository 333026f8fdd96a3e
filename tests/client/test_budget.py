"""Pixels in memory at once: as many as fit, and a large picture alone."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from ssd_client.budget import PixelBudget


def test_pictures_wait_for_room() -> None:
    budget, lock = PixelBudget(100), threading.Lock()
    held: list[int] = []
    dice = random.Random(0)

    def work(pixels: int) -> None:
        with budget.share() as take:
            take(pixels)
            with lock:
                held.append(pixels)
                assert sum(held) <= 100 or len(held) == 1
            time.sleep(0.001)
            with lock:
                held.remove(pixels)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, (dice.choice((10, 40, 60, 300)) for _ in range(200))))


def test_what_fails_gives_its_room_back() -> None:
    budget = PixelBudget(10)

    def fail() -> None:
        with budget.share() as take:
            take(10)
            raise ValueError("damaged")

    for _ in range(3):
        with pytest.raises(ValueError, match="damaged"):
            fail()
    with budget.share():
        pass  # a picture that was refused before it was decoded takes nothing
