"""The generators against the public definitions, restated by hand, and against facts of published detectors."""

from __future__ import annotations

import hashlib
import itertools
import math

import numpy as np
import pytest
from numpy.typing import NDArray

from build.errors import OptionError
from build.sources.anchor_grids import GENERATORS, PRESETS
from build.sources.anchors import describe, from_text

RES10 = (
    "priorbox:feature=38,19,10,5,5,5;min=30,60,111,162,213,264;max=60,111,162,213,264,315;"
    "ratios=2|2,3|2,3|2,3|2|2;step=8,16,32,64,100,300"
)


def rows(anchors: NDArray[np.float32], *numbers: int) -> list[list[float]]:
    return [[float(value) for value in anchors[number]] for number in numbers]


def digest(anchors: NDArray[np.float32]) -> str:
    return hashlib.sha256(np.round(anchors.astype(np.float64), 5).astype("<f4").tobytes()).hexdigest()


def test_ssd_grid_gives_the_anchors_of_a_tensorflow_detector() -> None:
    anchors = from_text("ssd-grid:min_scale=0.2;max_scale=0.95;layers=6;ratios=1,2,0.5,3,0.3333", 300, 300, 1917)
    assert anchors.dtype == np.float32
    # Of its constant Postprocessor/ExpandDims:0 (TensorFlow computed it in FP32), as cx,cy,w,h.
    expected = [
        [0.02631579, 0.02631579, 0.1, 0.1],
        [0.02631579, 0.02631579, 0.28284273, 0.14142136],
        [0.07894737, 0.02631579, 0.1, 0.1],
        [0.02631579, 0.07894737, 0.1, 0.1],
        [0.81578952, 0.86842108, 0.28284276, 0.14142132],
        [0.5, 0.5, 1.343503, 0.6717515],
        [0.5, 0.5, 0.97467947, 0.97467947],
    ]
    np.testing.assert_allclose(rows(anchors, 0, 1, 3, 57, 958, 1912, 1916), expected, atol=1e-6)
    np.testing.assert_allclose(anchors.sum(0, dtype=np.float64), [958.5, 958.5, 568.56114, 568.56778], atol=1e-4)
    np.testing.assert_array_equal(anchors, from_text("ssd-grid:", 300, 300))


def test_ssd_grid_shapes_come_from_strides_or_are_given() -> None:
    assert describe(from_text("ssd-grid:", 320, 320)).startswith("2,034 anchors: 20×20×3, 10×10×6, 5×5×6, 3×3×6")
    given = from_text("ssd-grid:feature=19x10,10x5;reduce_boxes_in_lowest_layer=0", 300, 600)
    assert describe(given).startswith("1,440 anchors: 19×10×6, 10×5×6;")
    # Squares on the picture: the scale is of the shorter side.
    np.testing.assert_allclose(given[0], [0.05, 0.5 / 19, 0.2, 0.1], rtol=1e-6)
    strided = from_text("ssd-grid:strides=8,16;interpolated_scale_aspect_ratio=0;ratios=1", 64, 32)
    assert describe(strided).startswith("104 anchors: 4×8×3, 2×4×1;")


def test_priorbox_gives_the_anchors_of_a_caffe_detector() -> None:
    anchors = from_text(RES10, 300, 300, 8892)
    expected = [
        [4 / 300, 4 / 300, 0.1, 0.1],
        [4 / 300, 4 / 300, math.sqrt(30 * 60) / 300, math.sqrt(30 * 60) / 300],
        [4 / 300, 4 / 300, 0.0707106813788414, 0.1414213627576828],
        [0.25333333015441895, 0.7866666913032532, 0.1414213627576828, 0.0707106813788414],
        [4.5, 4.5, 0.622253954410553, 1.244507908821106],  # its last feature map reaches far beyond the picture
    ]
    np.testing.assert_allclose(rows(anchors, 0, 1, 3, 4446, 8891), expected, atol=1e-7)
    assert digest(anchors) == "aef30938be37a95bf83a530d40399c1e1d1a965782430ceb1e96ef993b595a6a"


def test_priorbox_notations() -> None:
    with_brackets = "priorbox:feature=2x3;min=[8,16];max=[[16,32]];ratios=2"
    assert len(from_text(with_brackets, 48, 32)) == 2 * 3 * 8
    np.testing.assert_array_equal(
        from_text("priorbox:strides=8,16;min=8,16|32;ratios=2,0.5;flip=0", 48, 32),
        from_text("priorbox:feature=4x6,2x3;min=[8,16],[32];ratios=2|2;step=8x8,16x16", 48, 32),
    )
    # Caffe's step is image / feature where it is not given, and a max size of none gives no middle square.
    partly = from_text("priorbox:feature=3,1;min=30,60;max=|90;clip=0", 100, 100)
    np.testing.assert_allclose(partly[0], [1 / 6, 1 / 6, 0.3, 0.3], rtol=1e-6)
    assert describe(partly).startswith("11 anchors: 3×3×1, 1×1×2;")
    np.testing.assert_array_equal(partly, from_text("priorbox:feature=3,1;min=30,60;max=0,90", 100, 100))


def test_clipping_of_corners_and_of_values() -> None:
    text = "priorbox:feature=2;min=80;step=75;offset=0.5"
    np.testing.assert_allclose(from_text(text, 100, 100)[3], [1.125, 1.125, 0.8, 0.8])
    np.testing.assert_allclose(from_text(f"{text};clip=1", 100, 100)[3], [0.8625, 0.8625, 0.275, 0.275], rtol=1e-6)
    np.testing.assert_allclose(from_text(f"{text};clip=values", 100, 100)[3], [1, 1, 0.8, 0.8])


def test_nvidia_ssd300_goes_box_by_box_and_then_over_the_cells() -> None:
    anchors = from_text("nvidia-ssd300", 300, 300, 8732)
    square, middle, root = 21 / 300, math.sqrt(21 * 45) / 300, math.sqrt(2)
    expected = {
        0: [4 / 300, 4 / 300, square, square],
        1: [12 / 300, 4 / 300, square, square],
        38: [4 / 300, 12 / 300, square, square],
        1444: [4 / 300, 4 / 300, middle, middle],
        2888: [4 / 300, 4 / 300, square * root, square / root],
        4332: [4 / 300, 4 / 300, square / root, square * root],
        5776: [8 / 300, 8 / 300, 45 / 300, 45 / 300],
        5776 + 4 * 361: [8 / 300, 8 / 300, 0.15 * math.sqrt(3), 0.15 / math.sqrt(3)],
        5776 + 2166 + 9: [1, 16 / 300, 99 / 300, 99 / 300],  # 9.5 · 32 / 300 is limited to 1
        8730: [0.5, 0.5, 1, 261 / 300 / root],
        8731: [0.5, 0.5, 261 / 300 / root, 1],
    }
    np.testing.assert_allclose(rows(anchors, *expected), list(expected.values()), rtol=1e-6)


def test_mlperf_ssd_resnet34() -> None:
    anchors = from_text("mlperf-ssd-resnet34", 1200, 1200, 15130)
    assert describe(anchors).startswith("15,130 anchors: 50×50×4, 25×25×6, 13×13×6, 7×7×6, 3×3×8;")
    expected = {
        0: [0.01, 0.01, 0.07, 0.07],
        2500: [0.01, 0.01, math.sqrt(84 * 180) / 1200, math.sqrt(84 * 180) / 1200],
        13750: [46 / 1200, 46 / 1200, 0.33, 0.33],  # step int(1200 / 13) = 92
        13751: [138 / 1200, 46 / 1200, 0.33, 0.33],
        15129: [1000 / 1200, 1000 / 1200, 0.87 / math.sqrt(2), 1],
    }
    np.testing.assert_allclose(rows(anchors, *expected), list(expected.values()), rtol=1e-6)


@pytest.mark.parametrize(
    ("text", "width", "height", "count", "start"),
    [
        ("caffe-ssd300", 300, 300, 8732, "8,732 anchors: 38×38×4, 19×19×6, 10×10×6, 5×5×6, 3×3×4, 1×1×4;"),
        ("pytorch-ssd-mobilenet", 300, 300, 3000, "3,000 anchors: 19×19×6, 10×10×6, 5×5×6, 3×3×6, 2×2×6, 1×1×6;"),
        ("retinaface", 640, 640, 16800, "16,800 anchors: 80×80×2, 40×40×2, 20×20×2; sizes 0.03 .. 0.80"),
        ("retinaface:step=8,16,32", 640, 360, 9520, "9,520 anchors: 45×80×2, 23×40×2, 12×20×2;"),
        ("ultraface", 320, 240, 4420, "4,420 anchors: 30×40×3, 15×20×2, 8×10×2, 4×5×3;"),
        ("ultraface", 640, 480, 17640, "17,640 anchors: 60×80×3, 30×40×2, 15×20×2, 8×10×3;"),
        ("blazeface-front", 128, 128, 896, "896 anchors: 16×16×2, 8×8×6; sizes 1.00 .. 1.00"),
        ("blazeface-short-range", 128, 128, 896, "896 anchors: 16×16×2, 8×8×6;"),
        ("blazeface-back", 256, 256, 896, "896 anchors: 16×16×2, 8×8×6;"),
        ("blazeface-full-range", 192, 192, 2304, "2,304 anchors: 48×48×1;"),
        ("mediapipe:strides=8,16,16,16;size=128", 128, 128, 896, "896 anchors: 16×16×2, 8×8×6;"),
        ("cells:strides=8,16,32", 416, 416, 3549, "3,549 anchors: 52×52×1, 26×26×1, 13×13×1; sizes 0.02 .. 0.08"),
    ],
)
def test_counts_and_levels(text: str, width: int, height: int, count: int, start: str) -> None:
    assert describe(from_text(text, width, height, count)).startswith(start)


def test_pytorch_ssd_has_both_squares_and_then_the_ratios() -> None:
    anchors = from_text("pytorch-ssd-mobilenet", 300, 300)
    sizes = [(60, 60), (math.sqrt(60 * 105),) * 2]
    sizes += [(60 * f, 60 / f) for f in (math.sqrt(2), 1 / math.sqrt(2), math.sqrt(3), 1 / math.sqrt(3))]
    np.testing.assert_allclose(anchors[:6, 2:] * 300, sizes, rtol=1e-6)
    np.testing.assert_allclose(anchors[6], [24 / 300, 8 / 300, 0.2, 0.2], rtol=1e-6)


def test_faces_of_retinaface_and_ultraface() -> None:
    retinaface = from_text("retinaface", 640, 360)
    np.testing.assert_allclose(
        rows(retinaface, 0, 1, 2, 9519),
        [[4 / 640, 4 / 360, 16 / 640, 16 / 360], [4 / 640, 4 / 360, 32 / 640, 32 / 360],
         [12 / 640, 4 / 360, 16 / 640, 16 / 360], [19.5 * 32 / 640, 11.5 * 32 / 360, 512 / 640, 512 / 360]],
        rtol=1e-6,
    )  # fmt: skip
    ultraface = from_text("ultraface", 320, 240)
    # Its third level has 8 rows of 240 / 8 = 30 pixels (not of the stride's 32); 256 pixels are cut to its height.
    np.testing.assert_allclose(
        rows(ultraface, 0, 2, 3600 + 600, 4419),
        [[0.0125, 0.5 / 30, 10 / 320, 10 / 240], [0.0125, 0.5 / 30, 24 / 320, 24 / 240],
         [0.05, 0.0625, 0.2, 64 / 240], [0.9, 0.875, 0.8, 1]],
        rtol=1e-6,
    )  # fmt: skip


def test_mediapipe_gives_the_centres_of_blazeface() -> None:
    anchors = from_text("blazeface-front", 128, 128)
    expected = [[0.03125, 0.03125, 1, 1]] * 2 + [[0.09375, 0.03125, 1, 1], [0.78125, 0.09375, 1, 1]]
    np.testing.assert_array_equal(rows(anchors, 0, 1, 3, 57), expected)
    np.testing.assert_array_equal(
        rows(anchors, 448, 891, 895), [[0.03125, 0.90625, 1, 1]] + [[0.9375, 0.9375, 1, 1]] * 2
    )
    anchors[:, 2:] = 1e-12  # as they were adapted for box_coding = "corner"
    assert digest(anchors) == "dd0d4cd51fffc4bdf46f62b1b845d0ac9b56fa71eb30f9798c07e5edcb256251"


def test_mediapipe_without_fixed_sizes() -> None:
    anchors = from_text("mediapipe:strides=8,16,16,16;fixed_anchor_size=0;min_scale=0.25;max_scale=0.85", 128, 128)
    scales = [0.25, 0.45, 0.65, 0.85, 1.0]
    middles = [math.sqrt(a * b) for a, b in itertools.pairwise(scales)]
    sizes = [size for pair in zip(scales, middles, strict=False) for size in pair]
    np.testing.assert_allclose(anchors[:2, 2], sizes[:2], rtol=1e-6)
    np.testing.assert_allclose(anchors[512:518, 3], sizes[2:], rtol=1e-6)


def test_cells_have_their_offset_and_size() -> None:
    fcos = from_text("cells:strides=8,16;offset=0.5;size=1", 64, 32)
    yolox = from_text("cells:strides=8,16;offset=0;size=2", 64, 32)
    np.testing.assert_array_equal(fcos[1], np.float32([12 / 64, 4 / 32, 8 / 64, 8 / 32]))
    np.testing.assert_array_equal(yolox[1], np.float32([8 / 64, 0, 16 / 64, 16 / 32]))
    np.testing.assert_array_equal(fcos[-1], np.float32([56 / 64, 24 / 32, 16 / 64, 16 / 32]))
    assert len(from_text("cells:strides=8,16,32", 50, 50)) == 7 * 7 + 4 * 4 + 2 * 2  # rounded up


# -- what goes wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("priorbox:feature=2;mim=8", ["'mim' is no option", "did you mean min?", "for example priorbox:"]),
        ("priorbox:feature=2;min", ["'min' is not of the form key=value"]),
        ("priorbox:min=8", ["feature or strides is missing"]),
        ("priorbox:feature=2", ["min is missing"]),
        ("priorbox:feature=4,2,1;min=8,16",
         ["the feature maps are 3 (4×4, 2×2, 1×1), but min is given for 2 (8,16): level 3 has none",
          "give min for each of the 3 levels"]),
        ("priorbox:feature=4,2;min=8,16,32", ["min is given for 3 (8,16,32): there is no level 3"]),
        ("priorbox:feature=4,2;min=8,16;ratios=2|2,3|2", ["ratios is given for 3"]),
        ("priorbox:feature=4,2;min=8,16;max=16,12", ["level 2 (2×2): max sizes [12.0] are not above the min sizes"]),
        ("priorbox:feature=4;min=[8,16];max=16|", ["max is given for 2"]),
        ("priorbox:feature=4;min=[8,16];max=16", ["level 1 (4×4): min sizes are 2, but max sizes 1"]),
        ("priorbox:feature=4;min=0", ["min sizes are [0.0]"]),
        ("priorbox:feature=4;min=8;ratios=0", ["aspect ratios are [0.0]"]),
        ("priorbox:feature=4;min=8;clip=yes", ["clip is 'yes', but must be one of 0, 1, values"]),
        ("priorbox:feature=4;min=8;flip=2", ["flip is '2'"]),
        ("priorbox:feature=four;min=8", ["feature has 'four', which is no number"]),
        ("priorbox:feature=4;min=-8", ["min has '-8', which is no number"]),
        ("priorbox:feature=4.5;min=8", ["feature is 4.5×4.5, but must be whole numbers above 0"]),
        ("priorbox:feature=4,2;min=8,16;step=8,8|16", ["level 1 of step has 2 values"]),
        ("priorbox:step=0;min=8", ["step has a 0, so the feature maps are unknown"]),
        ("ssd-grid:layers=5;feature=4,2", ["layers is 5, but the feature maps are 2"]),
        ("ssd-grid:ratios=", ["scales and ratios must be there and above 0"]),
        ("mediapipe:", ["feature or strides is missing"]),
        ("cells:offset=0", ["strides is missing"]),
        ("cells:strides=8;size=0", ["size is 0"]),
        ("cells:strides=8,16;feature=4", ["strides is given for 2"]),
        ("nvidia-ssd300", ["is for an input of 300×300, but this model's is 64×64", "priorbox:feature=38,19,10"]),
        ("priorbx:feature=2", ["neither a generator nor a file that ends in .npy, .npz, .txt, .csv", "mean priorbox?"]),
        ("anchors.bin", ["neither a generator nor a file"]),
        ("nowhere.npy", ["nowhere.npy: cannot be read as anchors: No such file or directory"]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told(text: str, parts: list[str]) -> None:
    with pytest.raises(OptionError) as error:
        from_text(text, 64, 64)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("text", "count", "change"),
    [
        (PRESETS["caffe-ssd300"].text(), 8892, "feature maps of 5×5 at level 5 and 5×5 at level 6"),
        (PRESETS["caffe-ssd300"].text(), 11620, "6 boxes a cell in place of 4 at level 1"),
        (PRESETS["caffe-ssd300"].text(), 8728, "the first 5 levels only"),
        (PRESETS["caffe-ssd300"].text(), 8744, "a feature map of 2×2 at level 6"),
        (PRESETS["caffe-ssd300"].text(), 12345, "compare each level with the network's feature maps"),
    ],
)
def test_a_count_that_differs_shows_every_level_and_a_change(text: str, count: int, change: str) -> None:
    with pytest.raises(OptionError) as error:
        from_text(text, 300, 300, count)
    what, fix = error.value.what, error.value.fix
    assert "gives 8,732 anchors for an input of 300×300 (height × width; level 1: 38×38×4 = 5,776; level 2" in what
    assert "level 6: 1×1×4 = 4), but the model's heads have" in what
    assert f"{abs(count - 8732):,} {'more' if count > 8732 else 'fewer'}" in what
    assert change in fix


def test_each_example_and_preset_works() -> None:
    for generator in GENERATORS.values():
        assert len(from_text(generator.example, 300, 300))
    for name, preset in PRESETS.items():
        height, width = map(int, preset.size or (64, 96))
        np.testing.assert_array_equal(from_text(name, width, height), from_text(preset.text(), width, height))
