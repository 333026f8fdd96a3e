"""The device functions, compiled for the host: exp, FP16, keys, bounds and overlap."""

from __future__ import annotations

import ctypes
import itertools
import math

import numpy as np
import pytest

from tests.plugins.library import Library


def pointers(*arrays: np.ndarray) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(array.ctypes.data) for array in arrays]


def test_exp_is_within_one_unit_in_the_last_place(emulated: Library) -> None:
    x = np.concatenate([np.linspace(-104.5, 89, 2_000_003), np.linspace(-1e-3, 1e-3, 10_001)]).astype(np.float32)
    y = np.empty_like(x)
    emulated.c.numericsExp(*pointers(x, y), ctypes.c_int64(len(x)))
    with np.errstate(over="ignore", under="ignore"):
        exact = np.exp(x.astype(np.float64))
        rounded = exact.astype(np.float32)
    finite = np.isfinite(rounded)
    assert np.array_equal(np.isfinite(y), finite)
    error = np.abs(y[finite] - exact[finite]) / np.spacing(np.maximum(rounded[finite], np.float32(1e-45)))
    assert error.max() < 1.0
    assert (y[finite] == rounded[finite]).mean() > 0.8


def test_exp_at_the_ends(emulated: Library) -> None:
    x = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 88.7228, 88.73, 1e30, -1e30, -103.9, -104.1], np.float32)
    y = np.empty_like(x)
    emulated.c.numericsExp(*pointers(x, y), ctypes.c_int64(len(x)))
    assert y[:2].tolist() == [1.0, 1.0]
    assert (y[2], y[3]) == (np.inf, 0)
    assert np.isnan(y[4])
    assert np.isfinite(y[5])
    assert y[6:9].tolist() == [np.inf, np.inf, 0.0]
    assert y[9] > 0
    assert y[10] == 0


def test_every_half_converts_as_numpy_does(emulated: Library) -> None:
    x = np.arange(65536, dtype=np.uint16)
    y = np.empty(65536, np.float32)
    emulated.c.numericsFromHalf(*pointers(x, y), ctypes.c_int64(len(x)))
    want = x.view(np.float16).astype(np.float32)
    assert np.array_equal(np.isnan(y), np.isnan(want))
    assert np.array_equal(y[~np.isnan(y)].view(np.uint32), want[~np.isnan(want)].view(np.uint32))


def test_ordered_bits_keep_the_order(emulated: Library) -> None:
    random = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32).view(np.float32)
    x = np.sort(np.concatenate([random[~np.isnan(random)], np.array([np.inf, -np.inf, 0, 1, -1], np.float32)]))
    y, back = np.empty(len(x), np.uint32), np.empty_like(x)
    emulated.c.numericsOrderedBits(*pointers(x, y, back), ctypes.c_int64(len(x)))
    assert np.array_equal(back.view(np.uint32), x.view(np.uint32))
    assert ((y[1:] > y[:-1]) == (x[1:] > x[:-1]))[x[1:] != 0].all()


def test_keys_order_by_score_then_class_then_anchor(emulated: Library) -> None:
    emulated.c.numericsKey.restype = ctypes.c_uint64
    anchors = 8732
    wanted = []
    for score, label, anchor in itertools.product((1.0, 0.5, 0.05, 1e-40), (0, 1, 79), (0, 1, anchors - 1)):
        back, index = ctypes.c_float(), ctypes.c_uint32()
        key = emulated.c.numericsKey(
            ctypes.c_float(score), label, anchor, anchors, ctypes.byref(back), ctypes.byref(index)
        )
        assert back.value == np.float32(score)
        assert divmod(index.value, anchors) == (label, anchor)
        wanted.append(key)
    assert wanted == sorted(wanted, reverse=True)
    assert len(set(wanted)) == len(wanted)


def test_the_bound_never_drops_a_candidate(emulated: Library) -> None:
    emulated.c.numericsLogitBound.restype = emulated.c.numericsSigmoid.restype = ctypes.c_float
    thresholds = np.random.default_rng(0).uniform(0, 1, 300).astype(np.float32)
    for threshold in [*thresholds.tolist(), 1e-30, 1 - 2**-24]:
        bound = emulated.c.numericsLogitBound(ctypes.c_float(threshold))
        assert emulated.c.numericsSigmoid(ctypes.c_float(bound)) <= threshold
        just_above = bound + 0.03  # and it is not so low that it keeps everything
        assert emulated.c.numericsSigmoid(ctypes.c_float(just_above)) > threshold or just_above > 15
    assert emulated.c.numericsLogitBound(ctypes.c_float(0)) == -math.inf
    assert emulated.c.numericsLogitBound(ctypes.c_float(1)) == math.inf


@pytest.mark.parametrize(
    ("a", "b", "threshold", "wanted"),
    [
        ((0, 0, 1, 1), (0, 0, 1, 1), 0.99, True),
        ((0, 0, 1, 1), (0, 0, 1, 1), 1.0, False),  # at the threshold is not above it
        ((0, 0, 2, 1), (1, 0, 3, 1), 0.33, True),
        ((0, 0, 2, 1), (1, 0, 3, 1), 0.34, False),
        ((0, 0, 1, 1), (1, 0, 2, 1), 0.0, False),  # an edge in common
        ((0, 0, 1, 1), (2, 2, 3, 3), 0.0, False),  # apart in x and in y: the product of both gaps is positive
        ((1, 0, 0, 1), (0, 0, 1, 1), 0.0, False),  # flipped
        ((0, 0, 0, 1), (0, 0, 1, 1), 0.0, False),  # flat
        ((math.nan, 0, 1, 1), (0, 0, 1, 1), 0.0, False),
        ((0, 0, math.inf, 1), (0, 0, math.inf, 1), 0.0, False),  # the union is NaN
        ((0, 0, 1e-30, 1e-30), (0, 0, 1e-30, 1e-30), 0.0, False),  # the area is 0
        ((0, 0, 1, 1), (0, 0, 1, 1), math.nan, False),
    ],
)
def test_overlap(emulated: Library, a: tuple[float, ...], b: tuple[float, ...], threshold: float, wanted: bool) -> None:
    boxes = [np.array(box, np.float32) for box in (a, b)]
    for first, second in (boxes, boxes[::-1]):
        got = emulated.c.numericsOverlaps(*pointers(first, second), ctypes.c_float(threshold))
        assert bool(got) == wanted
