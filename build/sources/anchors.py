"""Anchors: FP32 [N,4] of cx,cy,w,h in 0..1 of the image, in the order of the heads' rows.

- `from_text`: what a user gives: a file, or a generator with its options;
- `priorbox_node`: a PriorBox node of a graph;
- `plausible_forms`, `guess_form`, `corners_to_centers`: an array in another order or in pixels;
- `describe`: a short line for people.

All arithmetic is in FP64; the result is cast to FP32 once.
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from build.errors import GraphError, OptionError
from build.sources.anchor_grids import GENERATORS, PRESETS, Grid, Level, Options, by, prior_level

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

ORDERS = ("cxcywh", "xyxy", "yxyx", "xywh", "cycxhw")
UNITS = ("fraction", "pixel")
SUFFIXES = (".npy", ".npz", ".txt", ".csv")
_SAME = 1e-4  # of the image: a smaller difference is rounding

# -- what the user gives -----------------------------------------------------------------------------------------------


def from_text(text: str, width: int, height: int, count: int = 0, folder: Path = Path()) -> NDArray[np.float32]:
    """The anchors that a user gives.

    Args:
        text: a file, a preset, or a generator: `name:key=value;key=value`.
        width: of the model's input.
        height: of the model's input.
        count: how many rows the model's heads have; 0 = unknown.
        folder: what a file's path is relative to.

    Returns:
        FP32 [N,4]: from a generator cx,cy,w,h in 0..1; from a file its rows as they are (see `guess_form`).

    Raises:
        OptionError: what is wrong with it; where the count differs, with the numbers of each level.
    """
    name = text.partition(":")[0]
    if name in GENERATORS or name in PRESETS:
        options = Options(text, (height, width))
        grid = options.generator.grid(options)
        if count and sum(map(len, grid.levels)) != count:
            raise _miscount(options, grid.levels, count)
        return grid.boxes()
    path = folder / text
    if path.suffix.lower() not in SUFFIXES:
        known = [*GENERATORS, *PRESETS]
        near = difflib.get_close_matches(name, known, 1)
        raise OptionError(
            f"anchors are {text!r}, which is neither a generator nor a file that ends in {', '.join(SUFFIXES)}",
            fix=(f"did you mean {near[0]}? " if near else "") + f"generators are {', '.join(known)}",
        )
    rows = _rows(_read(path), str(path)).astype(np.float32)
    if count and len(rows) != count:
        raise OptionError(
            f"{path}: has {describe(rows)}, but the model's heads have {count:,} rows",
            fix="take the anchors of this very model and input size",
        )
    return rows


def usual_anchors(presets: Sequence[str], count: int, width: int, height: int) -> dict[str, NDArray[np.float32]]:
    """The presets that give so many anchors for this input, with the anchors.

    Args:
        presets: names to look at, or beginnings of generators; empty = all presets.
        count: N.
        width: of the model's input.
        height: of the model's input.
    """
    fitting: dict[str, NDArray[np.float32]] = {}
    for text in presets or [*PRESETS]:
        try:
            rows = from_text(text, width, height, count)
        except OptionError:
            continue
        if not any(np.array_equal(rows, other) for other in fitting.values()):
            fitting[text] = rows
    return fitting


def _read(path: Path) -> ArrayLike:
    """The array in a file."""
    try:
        if path.suffix.lower() in (".npy", ".npz"):
            loaded = np.load(path, allow_pickle=False)
            if not isinstance(loaded, np.lib.npyio.NpzFile):
                return np.asarray(loaded)
            with loaded:
                if len(loaded.files) != 1:
                    raise OptionError(f"{path}: has the arrays {', '.join(loaded.files)}", fix="save the anchors alone")
                return np.asarray(loaded[loaded.files[0]])
        lines = [line.split("#")[0].strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except OptionError:
        raise
    except Exception as error:  # of a damaged file: zlib.error, NotImplementedError, MemoryError and others
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise OptionError(f"{path}: cannot be read as anchors: {reason}", fix="correct the path") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows += [[float(word) for word in re.split(r"\s*[,;\s]\s*", line)]] if line else []
        except ValueError:
            rows.append([])
        if line and len(rows[-1]) != 4:
            raise OptionError(f"{path}: line {number} is {line!r}, but must be 4 numbers", fix="comments begin with #")
    return rows


def _miscount(options: Options, levels: Sequence[Level], count: int) -> OptionError:
    """The error for anchors that are not as many as the heads' rows."""
    sums = "; ".join(f"level {number}: {level} = {len(level):,}" for number, level in enumerate(levels, 1))
    total = sum(map(len, levels))
    fixes = list(itertools.islice(_changes(levels, count), 3))
    return options.error(
        f"gives {total:,} anchors for an input of {by(options.size)} (height × width; {sums}), but the model's heads "
        f"have {count:,} rows, {abs(count - total):,} {'more' if count > total else 'fewer'}",
        f"{count:,} it would be with {', or with '.join(fixes)}; the network's feature maps tell"
        if fixes
        else "compare each level with the network's feature maps (rows × columns × boxes of a cell) and the input size",
    )


def _changes(levels: Sequence[Level], count: int) -> Iterator[str]:
    """Small changes that give the count: of a level's boxes, of its feature map, of two feature maps that follow."""
    rest = count - sum(map(len, levels))
    sides = [
        2 * levels[0].rows,
        *(level.rows for level in levels),
        1,
    ]  # with the bounds of the first and the last level
    for number, level in enumerate(levels, 1):
        kinds, odd = divmod(len(level) + rest, level.rows * level.columns)
        if not odd and 0 < kinds <= 3 * len(level.sizes):
            yield f"{kinds} boxes a cell in place of {len(level.sizes)} at level {number}"
        if sides[number - 1] >= (side := _side(level, len(level) + rest)) >= sides[number + 1]:
            yield f"a feature map of {side}×{side} at level {number}"
    if len(levels) > 1 and len(levels[-1]) + rest == 0:
        yield f"the first {len(levels) - 1} levels only"
    for number, (first, second) in enumerate(itertools.pairwise(levels), 1):
        for side in range(second.rows, sides[number - 1] + 1):
            other = _side(second, len(second) + rest + len(first) - side * side * len(first.sizes))
            if side != first.rows and other != second.rows and side >= other >= sides[number + 2]:
                yield f"feature maps of {side}×{side} at level {number} and {other}×{other} at level {number + 1}"


def _side(level: Level, needed: int) -> int:
    """The side of the square feature map that would have so many anchors; 0 where there is none."""
    cells, rest = divmod(max(needed, 0), len(level.sizes))
    side = math.isqrt(cells)
    return side if level.rows == level.columns and rest == 0 and side * side == cells else 0


# -- what a graph holds ------------------------------------------------------------------------------------------------


def priorbox_node(
    attributes: Mapping[str, Any], feature_hw: Sequence[int], image_hw: Sequence[int]
) -> NDArray[np.float32]:
    """The anchors of a Caffe PriorBox node (`anchor_grids.prior_level` has the formula).

    Args:
        attributes: of the node: min_sizes, and as far as they are there max_sizes, aspect_ratios (with or without 1 and
            the flipped ones), flip (1), clip (0), offset (0.5), steps [h, w] or step (missing or 0 = image/feature)
            and img_sizes [h, w] (missing or 0 = `image_hw`).
        feature_hw: rows and columns of the node's feature map.
        image_hw: height and width of the network's input.

    Returns:
        FP32 [rows·columns·boxes of a cell, 4].

    Raises:
        GraphError: the attributes are no PriorBox's.
    """

    def numbers(name: str) -> list[float]:
        return [float(value) for value in np.ravel(attributes.get(name, []))]

    def pair(values: list[float], otherwise: Sequence[float]) -> tuple[float, float]:
        return (values[0], values[-1]) if values and all(values) else (float(otherwise[0]), float(otherwise[1]))

    image = pair(numbers("img_sizes"), image_hw)
    step = pair(numbers("steps") or numbers("step"), (0, 0))
    try:
        level = prior_level(
            (feature_hw[0], feature_hw[1]),
            image,
            numbers("min_sizes"),
            numbers("max_sizes"),
            numbers("aspect_ratios"),
            bool(attributes.get("flip", 1)),
            step,
            float(attributes.get("offset", 0.5)),
        )
    except ValueError as wrong:
        raise GraphError(
            f"a PriorBox node of a {by((feature_hw[0], feature_hw[1]))} feature map: {wrong}",
            fix="give the anchors yourself: --anchors priorbox:…",
        ) from None
    return Grid([level], clip=str(int(bool(attributes.get("clip", 0))))).boxes()


def corners_to_centers(boxes: ArrayLike, order: str, width: float = 1, height: float = 1) -> NDArray[np.float32]:
    """Boxes of any order as anchors.

    Args:
        boxes: [N,4] or [1,N,4].
        order: one of `ORDERS`: what the four columns are; c is a centre.
        width: of the image in units of the boxes: pixels, or 1 for fractions.
        height: likewise.

    Returns:
        FP32 [N,4]: cx,cy,w,h in 0..1.

    Raises:
        OptionError: the order is unknown or the array has another shape.
    """
    return _centers(_rows(boxes), order, width, height).astype(np.float32)


def _centers(rows: NDArray[np.float64], order: str, width: float = 1, height: float = 1) -> NDArray[np.float64]:
    if order not in ORDERS:
        raise OptionError(f"the order of the boxes is {order!r}, but must be one of {', '.join(ORDERS)}")
    if order in ("yxyx", "cycxhw"):
        rows, order = rows[:, [1, 0, 3, 2]], {"yxyx": "xyxy", "cycxhw": "cxcywh"}[order]
    first, second = rows[:, :2], rows[:, 2:]
    if order == "xyxy":
        first, second = (first + second) / 2, second - first
    elif order == "xywh":
        first = first + second / 2
    return np.hstack([first, second]) / [width, height, width, height]


def _rows(array: ArrayLike, name: str = "the anchors") -> NDArray[np.float64]:
    """An array as FP64 [N,4]."""
    values = np.asarray(array)
    shape = values.shape[1:] if values.ndim == 3 and values.shape[0] == 1 else values.shape
    if values.dtype.kind not in "fiu" or len(shape) != 2 or shape[1] != 4 or not shape[0]:
        raise OptionError(f"{name}: must be numbers [N,4], but are {values.dtype} {list(values.shape)}")
    rows = values.reshape(shape).astype(np.float64)
    if not np.isfinite(rows).all():
        raise OptionError(f"{name}: row {int(np.argmin(np.isfinite(rows).all(1)))} has a value that is not finite")
    return rows


# -- what the values tell ----------------------------------------------------------------------------------------------


def guess_form(array: ArrayLike, width: int, height: int) -> tuple[str, str]:
    """(order, unit) of an array of anchors, from its values alone; one of `ORDERS` and of `UNITS`.

    Args:
        array: [N,4] or [1,N,4].
        width: of the network's input.
        height: likewise.

    Raises:
        OptionError: the values fit no form, or more than one.
    """
    forms = plausible_forms(array, width, height)
    if len(forms) == 1:
        return forms[0]
    rows = _rows(array)
    ranges = ", ".join(f"{low:.4g} .. {high:.4g}" for low, high in zip(rows.min(0), rows.max(0), strict=True))
    fits = " and as ".join(f"{order} in {unit}s" for order, unit in forms)
    raise OptionError(
        f"the {len(rows):,} anchors have columns of {ranges}: "
        + (
            f"they can be read as {fits}"
            if forms
            else f"in no order are they boxes on grids over {height}×{width} (height × width)"
        ),
        why="" if forms else "they are of another input size, clipped, or not in the order row, column",
        fix=f"name what the four columns are: --box-order {'|'.join(ORDERS)}, or generate the anchors",
    )


def plausible_forms(array: ArrayLike, width: int, height: int) -> list[tuple[str, str]]:
    """All (order, unit) that an array of anchors can have; arguments and errors as for `guess_form`.

    A form fits if every box has an area, the centres' median is in the middle of the image, x changes at least as often
    as y from row to row, and the anchors are regular grids with the same boxes in each cell. Arrays that are no such
    grids because they were clipped get the form with the fewest distinct centres and sizes. Of forms that give the same
    anchors, the first counts.
    """
    rows = _rows(array)
    candidates: dict[tuple[str, str], NDArray[np.float64]] = {}
    for order, unit in itertools.product(ORDERS, UNITS):
        centers = _centers(rows, order, *((width, height) if unit == "pixel" else (1, 1)))
        middle = np.median(centers[:, :2], axis=0)
        x_changes, y_changes = np.count_nonzero(abs(np.diff(centers[:, :2], axis=0)) > _SAME, axis=0)
        if (centers[:, 2:] > 0).all() and (abs(middle - 0.5) < 0.25).all() and x_changes >= y_changes:
            candidates[order, unit] = centers
    forms: list[tuple[str, str]] = []
    for form, centers in candidates.items():
        levels = _levels(centers)
        known = any(np.allclose(centers, candidates[other], atol=1e-5) for other in forms)
        if levels and all(map(_starts_in_its_cell, levels)) and not known:
            forms.append(form)
    return forms or _fewest_values(candidates)


def _levels(centers: NDArray[np.float64]) -> list[Level]:
    """The levels that these anchors are, row by row; none where they are no regular grids.

    A level ends where cy falls. In the layout `boxes`, blocks of equal grids follow each other: they are one level.
    Anchors whose values were limited to 0..1 still count.
    """
    levels: list[Level] = []
    for block in np.split(centers, np.flatnonzero(np.diff(centers[:, 1]) < -_SAME) + 1):
        rows = 1 + np.count_nonzero(np.diff(block[:, 1]) > _SAME)
        row = block[: len(block) // rows]
        columns = 1 + np.count_nonzero(abs(np.diff(row[:, 0])) > _SAME)
        kinds = len(row) // columns
        if rows * columns * kinds != len(block):
            return []
        first, next_column, next_row = block[0, :2], block[kinds % len(row), 0], block[len(row) % len(block), 1]
        step = (next_column - first[0], next_row - first[1])
        level = Level(rows, columns, tuple(first), step, tuple(map(tuple, block[:kinds, 2:])))
        boxes = level.boxes().reshape(-1, 4)
        if not any(np.allclose(grid, block, rtol=_SAME, atol=_SAME) for grid in (boxes, boxes.clip(0, 1))):
            return []
        before = levels[-1] if levels else None
        same = before and (before.rows, before.columns) == (rows, columns)
        if before and same and np.allclose((before.first, before.step), (first, step), atol=_SAME):
            levels[-1] = Level(rows, columns, before.first, before.step, before.sizes + level.sizes)
        else:
            levels.append(level)
    return levels


def _starts_in_its_cell(level: Level) -> bool:
    """Whether the first centre is in the first cell, as far as there are several cells."""
    places = zip(level.first, level.step, (level.columns, level.rows), strict=True)
    return all(-0.01 < first / step < 0.99 for first, step, cells in places if cells > 1)


def _fewest_values(candidates: Mapping[tuple[str, str], NDArray[np.float64]]) -> list[tuple[str, str]]:
    """The form with the fewest distinct centres and sizes by far; none where that is not plain."""

    def distinct(values: NDArray[np.float64]) -> int:
        return len(np.unique(np.round(values / _SAME), axis=0))

    spread = sorted(
        (distinct(centers[:, :1]) + distinct(centers[:, 1:2]) + distinct(centers[:, 2:]), form)
        for form, centers in candidates.items()
    )
    others = [count for count, _ in spread[1:]] + [len(centers) for centers in candidates.values()]
    return [form for count, form in spread[:1] if 4 * count <= min(others)]


def describe(anchors: ArrayLike) -> str:
    """A line for people: how many anchors, the levels where they are regular grids, and sizes √(w·h).

    For example "1,917 anchors: 19×19×3, 10×10×6, 5×5×6, 3×3×6, 2×2×6, 1×1×6; sizes 0.10 .. 0.97".
    """
    centers = _rows(anchors)
    levels = [str(level) for level in _levels(centers)]
    if len(levels) > 8:
        levels = [*levels[:3], "…", levels[-1]]
    sizes = np.sqrt(np.maximum(centers[:, 2] * centers[:, 3], 0))
    extent = " .. ".join(f"{size:.2f}" if size >= 0.005 else f"{size:.1g}" for size in (sizes.min(), sizes.max()))
    plural = "s" if len(centers) > 1 else ""
    return f"{len(centers):,} anchor{plural}: {', '.join(levels) or 'no regular grid'}; sizes {extent}"
