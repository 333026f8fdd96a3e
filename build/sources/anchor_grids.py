"""Anchors on the grids of feature maps, as the public detectors define them: generators with options, and presets.

A text names a generator or a preset, and options over its own: `name:key=value;key=value`. `|` separates the values of
levels and a comma those of a level (`min=16,32|64,128`); brackets do, too (`min=[16,32],[64,128]`). A list with commas
alone has a value for each level (`feature=38,19,10`), ratios excepted, which then belong to every level. A feature map
or step that is no square is height×width: `feature=12x20`. In a shell the text needs quotes.
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from build.errors import OptionError

if TYPE_CHECKING:
    from numpy.typing import NDArray

Pair = tuple[float, float]
Shape = tuple[int, int]


@dataclass(frozen=True)
class Level:
    """The anchors of one feature map.

    Attributes:
        rows, columns: of the feature map.
        first: cx, cy of the first cell's centre in 0..1.
        step: from centre to centre along x and y in 0..1.
        sizes: w, h of each box of a cell in 0..1.
    """

    rows: int
    columns: int
    first: Pair
    step: Pair
    sizes: tuple[Pair, ...]

    def __len__(self) -> int:
        return self.rows * self.columns * len(self.sizes)

    def __str__(self) -> str:
        return f"{self.rows}×{self.columns}×{len(self.sizes)}"

    def boxes(self) -> NDArray[np.float64]:
        """FP64 [rows, columns, boxes of a cell, 4] of cx,cy,w,h."""
        grid = np.empty((self.rows, self.columns, len(self.sizes), 4))
        grid[..., 0] = (self.first[0] + np.arange(self.columns) * self.step[0])[None, :, None]
        grid[..., 1] = (self.first[1] + np.arange(self.rows) * self.step[1])[:, None, None]
        grid[..., 2:] = np.array(self.sizes)
        return grid


@dataclass(frozen=True)
class Grid:
    """Levels and how they are laid out.

    Attributes:
        levels: in the order of the heads' rows.
        order: `cells` (row, column, box of the cell) or `boxes` (box of the cell, row, column).
        clip: `0`, `1` (corners are moved into the image) or `values` (each of cx, cy, w, h is limited to 0..1).
    """

    levels: Sequence[Level]
    order: str = "cells"
    clip: str = "0"

    def boxes(self) -> NDArray[np.float32]:
        grids = [level.boxes() for level in self.levels]
        if self.order == "boxes":
            grids = [grid.transpose(2, 0, 1, 3) for grid in grids]
        centers = np.concatenate([grid.reshape(-1, 4) for grid in grids])
        if self.clip == "values":
            centers = centers.clip(0, 1)
        elif self.clip == "1":
            corners = np.hstack([centers[:, :2] - centers[:, 2:] / 2, centers[:, :2] + centers[:, 2:] / 2])
            low, high = np.split(corners.clip(0, 1), 2, axis=1)
            centers = np.hstack([(low + high) / 2, high - low])
        return centers.astype(np.float32)


def _level(shape: Shape, step: Pair, offset: float, sizes: Sequence[Pair]) -> Level:
    """A level from its feature map's (rows, columns), the centres' distance (y, x) in 0..1, and (w, h) in 0..1."""
    return Level(*shape, (offset * step[1], offset * step[0]), (step[1], step[0]), tuple(sizes))


# -- what the user writes ----------------------------------------------------------------------------------------------


class Options:
    """The options of a generator: `key=value;key=value`, over the preset's and the generator's own."""

    def __init__(self, text: str, size: Pair) -> None:
        self.text, self.size = text, size
        name, _, rest = text.partition(":")
        preset = PRESETS.get(name)
        self.generator = GENERATORS[preset.generator if preset else name]
        if preset and preset.size and size != preset.size:
            raise self.error(
                f"is for an input of {by(preset.size)}, but this model's is {by(size)} (height × width)",
                f"take another preset, or write the generator with your own numbers: {preset.text()}",
            )
        self.values = {**self.generator.options, **(preset.options if preset else {})}
        for part in filter(None, rest.split(";")):
            key, equals, value = (piece.strip() for piece in part.partition("="))
            if key not in self.values or not equals:
                near = difflib.get_close_matches(key, self.values, 1)
                hint = f"did you mean {near[0]}? " if near and equals else ""
                raise self.error(
                    f"{key!r} is no option" if equals else f"{part!r} is not of the form key=value",
                    f"{hint}options are {', '.join(self.values)}; for example {self.generator.example}",
                )
            self.values[key] = value

    def error(self, problem: str, fix: str = "") -> OptionError:
        """The error that names the whole text."""
        return OptionError(f"anchors {self.text!r}: {problem}", fix=fix)

    def _pair(self, key: str, token: str) -> Pair:
        """`8` → (8, 8), `30x40` → (30, 40): height and width."""
        try:
            numbers = [float(number) for number in re.split("[x×]", token)]
        except ValueError:
            numbers = []
        if not 0 < len(numbers) < 3 or not all(math.isfinite(number) and number >= 0 for number in numbers):
            raise self.error(f"{key} has {token!r}, which is no number", f"for example {self.generator.example}")
        return numbers[0], numbers[-1]

    def levels(self, key: str, count: int = 0, shared: bool = False) -> list[list[Pair]]:
        """The values of each level; pairs of height and width.

        `|` or brackets separate levels and commas the values of a level; where neither `|` nor brackets are there, each
        value is a level, or with `shared` all of them belong to every level.

        Args:
            key: the option.
            count: how many levels there are; 0 = as many as written. An option that is not given has no values.
            shared: see above.
        """
        value = self.values[key]
        if "[" in value:
            texts = re.findall(r"\[([^\[\]]*)\]", value)
        elif "|" in value:
            texts = value.split("|")
        elif shared or not value:
            texts = [value] * count
        else:
            texts = value.split(",")
        levels = [[self._pair(key, token) for token in text.split(",") if token.strip()] for text in texts]
        if count and len(levels) != count:
            beyond = f"level {len(levels) + 1} has none" if len(levels) < count else f"there is no level {count + 1}"
            shapes = ", ".join(by(shape) for shape in self.shapes())
            raise self.error(
                f"the feature maps are {count} ({shapes}), but {key} is given for {len(levels)} ({value}): {beyond}",
                f"give {key} for each of the {count} levels; `|` separates levels, a comma the values of a level",
            )
        return levels

    def pairs(self, key: str, count: int = 0) -> list[Pair]:
        """A single value for each level."""
        levels = self.levels(key, count)
        for number, values in enumerate(levels, 1):
            if len(values) != 1:
                raise self.error(f"level {number} of {key} has {len(values)} values", f"give {key} a value a level")
        return [values[0] for values in levels]

    def number(self, key: str) -> float:
        """The number of an option."""
        return self._pair(key, self.values[key])[0]

    def flag(self, key: str) -> bool:
        """Whether an option is 1."""
        return self.choice(key, "0", "1") == "1"

    def choice(self, key: str, *choices: str) -> str:
        """An option's value, which is one of the choices."""
        if self.values[key] not in choices:
            raise self.error(f"{key} is {self.values[key]!r}, but must be one of {', '.join(choices)}")
        return self.values[key]

    def shapes(self, default: str = "") -> list[Shape]:
        """Rows and columns of the feature maps: as given, or the input's size by strides (or steps), rounded up."""
        if self.values.get("feature"):
            given = self.pairs("feature")
        else:
            keys = [key for key in ("strides", "step") if self.values.get(key)]
            if not keys and default:
                self.values["strides"], keys = default, ["strides"]
            if not keys:
                raise self.missing(*(key for key in ("feature", "strides") if key in self.values))
            strides = self.pairs(keys[0])
            if not all(math.prod(stride) for stride in strides):
                raise self.error(f"{keys[0]} has a 0, so the feature maps are unknown", "give them: feature=…")
            given = [(math.ceil(self.size[0] / y), math.ceil(self.size[1] / x)) for y, x in strides]
        if not all(side >= 1 and side % 1 == 0 for shape in given for side in shape):
            raise self.error(f"feature is {', '.join(map(by, given))}, but must be whole numbers above 0")
        return [(int(rows), int(columns)) for rows, columns in given]

    def missing(self, *keys: str) -> OptionError:
        """The error for an option that must be there."""
        return self.error(f"{' or '.join(keys)} is missing", f"for example {self.generator.example}")


def by(pair: Pair) -> str:
    """`30×40`."""
    return f"{pair[0]:g}×{pair[1]:g}"


# -- generators --------------------------------------------------------------------------------------------------------


def prior_level(
    shape: Shape,
    image: Pair,
    minimum: Sequence[float],
    maximum: Sequence[float],
    ratios: Sequence[float],
    flip: bool,
    step: Pair,
    offset: float,
) -> Level:
    """A level of Caffe SSD's PriorBox (Liu et al. 2016, section 2.2; weiliu89/caffe, prior_box_layer.cpp).

    For each min size, a cell has: a square of it; with a max size, a square of sqrt(min·max); for each aspect ratio
    other than 1, w = min·sqrt(ratio) and h = min/sqrt(ratio), and with `flip` the same of 1/ratio. A ratio that is
    there already (to 1e-6) is not repeated, so ratios with and without their inverses give the same. Centres are at
    (i + offset)·step; a step of 0 is image/feature.

    Raises:
        ValueError: the sizes are wrong.
    """
    if not minimum or min(minimum) <= 0:
        raise ValueError(f"min sizes are {list(minimum)}, but must be there and above 0")
    if maximum and len(maximum) != len(minimum):
        raise ValueError(f"min sizes are {len(minimum)}, but max sizes {len(maximum)}")
    if any(high <= low for low, high in zip(minimum, maximum, strict=False)):
        raise ValueError(f"max sizes {list(maximum)} are not above the min sizes {list(minimum)}")
    if any(ratio <= 0 for ratio in ratios):
        raise ValueError(f"aspect ratios are {list(ratios)}, but must be above 0")
    distinct = [1.0]
    for ratio in ratios:
        if not any(abs(ratio - other) < 1e-6 for other in distinct):
            distinct += [ratio, 1 / ratio] if flip else [ratio]
    height, width = image
    sizes = []
    for number, low in enumerate(minimum):
        square = [low, math.sqrt(low * maximum[number])] if maximum else [low]
        sizes += [(side / width, side / height) for side in square]
        sizes += [(low * math.sqrt(r) / width, low / math.sqrt(r) / height) for r in distinct[1:]]
    pixels = (step[0] or height / shape[0], step[1] or width / shape[1])
    return _level(shape, (pixels[0] / height, pixels[1] / width), offset, sizes)


def _priorbox(options: Options) -> Grid:
    """Caffe's PriorBox (`prior_level`), and what PyTorch ports changed about it.

    - NVIDIA's DefaultBoxes (DeepLearningExamples, PyTorch/Detection/SSD, ssd/utils.py: dboxes300_coco), and the same in
      MLPerf's SSD-ResNet34 (mlcommons/inference, models/ssd_r34.py: dboxes_R34_coco, with steps int(1200/feature) and
      scales s·1200/300): `order=boxes`, `clip=values`;
    - qfgaohao/pytorch-ssd (generate_ssd_priors in vision/utils/box_utils.py, mobilenetv1_ssd_config.py): `clip=values`;
    - RetinaFace (biubug6/Pytorch_Retinaface, layers/functions/prior_box.py): squares of the min sizes, ceil(size/step);
    - UltraFace (Linzaer/Ultra-Light-Fast-Generic-Face-Detector-1MB, fd_config.py): centres at (i + 0.5)/feature,
      `clip=values`.
    """
    shapes = options.shapes()
    count = len(shapes)
    if not options.values["min"]:
        raise options.missing("min")
    sizes = (options.levels("min", count), options.levels("max", count), options.levels("ratios", count, shared=True))
    minimum, maximum, ratios = ([[value for value, _ in level] for level in levels] for levels in sizes)
    steps = options.pairs("step", count) if options.values["step"] else [(0.0, 0.0)] * count
    flip, offset = options.flag("flip"), options.number("offset")
    levels = []
    for number, facts in enumerate(zip(minimum, maximum, ratios, steps, shapes, strict=True), 1):
        low, high, ratio, step, shape = facts
        try:
            high = [] if not any(high) else high
            levels.append(prior_level(shape, options.size, low, high, ratio, flip, step, offset))
        except ValueError as wrong:
            raise options.error(f"level {number} ({by(shape)}): {wrong}", "correct that level's numbers") from None
    return Grid(levels, options.choice("order", "cells", "boxes"), options.choice("clip", "0", "1", "values"))


def _layers(options: Options, count: int) -> list[list[Pair]]:
    """(w, h) of each box of each layer, as TensorFlow's and MediaPipe's SSD anchors both have them.

    Scales go from min_scale to max_scale in equal steps (Liu et al. 2016, eq. 4), and a last one of 1 follows. A layer
    has its scale at each ratio, and sqrt(scale·next scale) at the interpolated ratio, if that is above 0. A reduced
    lowest layer has (0.1, 1), (scale, 2) and (scale, 0.5) only. w = scale·sqrt(ratio) and h = scale/sqrt(ratio).
    """
    low, high = options.number("min_scale"), options.number("max_scale")
    scales = [low + (high - low) * i / (count - 1) for i in range(count)] if count > 1 else [(low + high) / 2]
    ratios = [value for value, _ in options.levels("ratios", 1, shared=True)[0]]
    interpolated = options.number("interpolated_scale_aspect_ratio")
    if not ratios or min(ratios) <= 0 or min(scales) <= 0:
        raise options.error("scales and ratios must be there and above 0")
    layers = []
    for scale, following in zip(scales, [*scales[1:], 1.0], strict=True):
        layer = [(scale, ratio) for ratio in ratios]
        layers.append(layer + ([(math.sqrt(scale * following), interpolated)] if interpolated else []))
    if options.flag("reduce_boxes_in_lowest_layer"):
        layers[0] = [(0.1, 1.0), (scales[0], 2.0), (scales[0], 0.5)]
    return [[(scale * math.sqrt(ratio), scale / math.sqrt(ratio)) for scale, ratio in layer] for layer in layers]


def _ssd_grid(options: Options) -> Grid:
    """TensorFlow Object Detection API's `ssd_anchor_generator` (anchor_generators/multiple_grid_anchor_generator.py).

    Sizes are fractions of the image's shorter side; centres are at (i + 0.5)/feature.
    """
    layers = int(options.number("layers")) if options.values["layers"] else 0
    shapes = options.shapes(",".join(str(16 << i) for i in range(layers or 6)))
    if layers and layers != len(shapes):
        raise options.error(f"layers is {layers}, but the feature maps are {len(shapes)}", "leave layers out")
    height, width = options.size
    y, x = min(options.size) / height, min(options.size) / width
    return Grid(
        [
            _level(shape, (1 / shape[0], 1 / shape[1]), 0.5, [(w * x, h * y) for w, h in sizes])
            for shape, sizes in zip(shapes, _layers(options, len(shapes)), strict=True)
        ]
    )  # fmt: skip


def _mediapipe(options: Options) -> Grid:
    """MediaPipe's SsdAnchorsCalculator (calculators/tflite/ssd_anchors_calculator.cc and its .proto).

    Consecutive layers of equal strides share one grid, whose cells have the boxes of all of them. Centres are at
    (i + offset)/feature. With fixed_anchor_size each w = h = 1: the network's boxes are then in units of the image.
    """
    if options.values["size"]:
        options.size = options.pairs("size")[0]
    shapes, offset = options.shapes(), options.number("anchor_offset")
    fixed = options.flag("fixed_anchor_size")
    layers = zip(shapes, _layers(options, len(shapes)), strict=True)
    levels = []
    for shape, same in itertools.groupby(layers, key=lambda layer: layer[0]):
        sizes = [(1.0, 1.0) if fixed else size for _, layer in same for size in layer]
        levels.append(_level(shape, (1 / shape[0], 1 / shape[1]), offset, sizes))
    return Grid(levels)


def _cells(options: Options) -> Grid:
    """The cells of anchor-free heads: centres at (i + offset)·stride, w = h = size·stride, in pixels of the input.

    `offset` is 0.5 for FCOS (Tian et al. 2019, section 3.1) and PicoDet, 0 for YOLOX (decode_outputs in
    yolox/models/yolo_head.py).
    """
    if not options.values["strides"]:
        raise options.missing("strides")
    (height, width), shapes = options.size, options.shapes()
    offset, size = options.number("offset"), options.number("size")
    if size <= 0:
        raise options.error("size is 0, so the boxes would be empty")
    return Grid(
        [
            _level(shape, (y / height, x / width), offset, [(size * x / width, size * y / height)])
            for shape, (y, x) in zip(shapes, options.pairs("strides", len(shapes)), strict=True)
        ]
    )


@dataclass(frozen=True)
class Generator:
    """A generator: its function, its options with their defaults (empty = not given), and an example."""

    grid: Callable[[Options], Grid]
    options: Mapping[str, str]
    example: str


@dataclass(frozen=True)
class Preset:
    """A generator with the numbers of a known network, which has an input of `size` (height, width), if not empty."""

    generator: str
    options: Mapping[str, str]
    size: Pair | tuple[()] = ()

    def text(self) -> str:
        """The same without the preset's name."""
        return f"{self.generator}:" + ";".join(f"{key}={value}" for key, value in self.options.items())


_SCALES = {
    "min_scale": "0.2", "max_scale": "0.95", "ratios": "1,2,0.5,3,0.3333", "interpolated_scale_aspect_ratio": "1",
    "reduce_boxes_in_lowest_layer": "1", "feature": "", "strides": "",
}  # fmt: skip
GENERATORS: Mapping[str, Generator] = {
    "priorbox": Generator(
        _priorbox,
        {"feature": "", "strides": "", "min": "", "max": "", "ratios": "", "step": "", "offset": "0.5", "flip": "1",
         "clip": "0", "order": "cells"},
        "priorbox:feature=38,19,10,5,3,1;min=30,60,111,162,213,264;max=60,111,162,213,264,315;"
        "ratios=2|2,3|2,3|2,3|2|2;step=8,16,32,64,100,300",
    ),
    "ssd-grid": Generator(_ssd_grid, {**_SCALES, "layers": ""}, "ssd-grid:min_scale=0.2;max_scale=0.95;layers=6"),
    "mediapipe": Generator(
        _mediapipe,
        {**_SCALES, "min_scale": "0.1484375", "max_scale": "0.75", "ratios": "1", "reduce_boxes_in_lowest_layer": "0",
         "size": "", "anchor_offset": "0.5", "fixed_anchor_size": "1"},
        "mediapipe:strides=8,16,16,16;size=128;fixed_anchor_size=1",
    ),
    "cells": Generator(
        _cells, {"strides": "", "feature": "", "offset": "0.5", "size": "1"}, "cells:strides=8,16,32;offset=0.5;size=1"
    ),
}  # fmt: skip


def _ssd(feature: str, low: str, high: str, ratios: str, step: str, **others: str) -> dict[str, str]:
    return {"feature": feature, "min": low, "max": high, "ratios": ratios, "step": step, **others}


_RATIOS = "2|2,3|2,3|2,3|2|2"
_BLAZEFACE = {"strides": "8,16,16,16", "min_scale": "0.1484375"}
PRESETS: Mapping[str, Preset] = {
    "caffe-ssd300": Preset(
        "priorbox",
        _ssd("38,19,10,5,3,1", "30,60,111,162,213,264", "60,111,162,213,264,315", _RATIOS, "8,16,32,64,100,300"),
        (300, 300),
    ),
    "nvidia-ssd300": Preset(
        "priorbox",
        _ssd("38,19,10,5,3,1", "21,45,99,153,207,261", "45,99,153,207,261,315", _RATIOS, "8,16,32,64,100,300",
             order="boxes", clip="values"),
        (300, 300),
    ),
    "mlperf-ssd-resnet34": Preset(
        "priorbox",
        _ssd("50,25,13,7,3,3", "84,180,396,612,828,1044", "180,396,612,828,1044,1260", _RATIOS,
             "24,48,92,171,400,400", order="boxes", clip="values"),
        (1200, 1200),
    ),
    "pytorch-ssd-mobilenet": Preset(
        "priorbox",
        _ssd("19,10,5,3,2,1", "60,105,150,195,240,285", "105,150,195,240,285,330", "2,3", "16,32,64,100,150,300",
             clip="values"),
        (300, 300),
    ),
    "retinaface": Preset("priorbox", {"min": "16,32|64,128|256,512", "step": "8,16,32"}),
    "ultraface": Preset(
        "priorbox", {"min": "10,16,24|32,48|64,96|128,192,256", "strides": "8,16,32,64", "clip": "values"}
    ),
    "blazeface-front": Preset("mediapipe", _BLAZEFACE, (128, 128)),
    "blazeface-short-range": Preset("mediapipe", _BLAZEFACE, (128, 128)),
    "blazeface-back": Preset("mediapipe", {"strides": "16,32,32,32", "min_scale": "0.15625"}, (256, 256)),
    "blazeface-full-range": Preset(
        "mediapipe", {"strides": "4", "interpolated_scale_aspect_ratio": "0"}, (192, 192)
    ),
}  # fmt: skip
