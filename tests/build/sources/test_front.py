"""Where a network takes its pixels: size, layout, type, and other inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from build.errors import ImportModelError, OptionError
from build.sources.editor import Editor
from build.sources.foreign import Wishes
from build.sources.front import find_front
from tests.build.sources.checks import check, imported
from tests.build.sources.layouts import Layout
from tests.build.sources.layouts_tensorflow import tensorflow
from tests.build.sources.layouts_without_nms import two_heads
from tests.build.sources.networks import BOXES, Network, anchors


def with_size(*size: int | str) -> Network:
    net = Network({"box": 4, "cls": 4}, size=size)
    net.out(net.rows("box"), "loc", ["batch", BOXES, 4])
    net.out(net.rows("cls"), "conf", ["batch", BOXES, 4])
    return net


def layout(net: Network, **wishes: int) -> Layout:
    return Layout(net.build(), 3, lambda x: (x, x), "raw-heads", Wishes(**wishes), table=anchors())  # type: ignore[arg-type]


def test_a_size_that_the_graph_leaves_open_must_be_said(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"leaves height and width open") as raised:
        imported(layout(with_size("h", "w")), tmp_path)
    assert "--set input.width" in raised.value.fix
    assert imported(layout(with_size("h", "w"), width=64, height=64), tmp_path).adapted.picture["width"] == 64


def test_a_size_that_contradicts_the_graph(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="but 32 x 32 was asked for"):
        imported(layout(with_size(64, 64), width=32, height=32), tmp_path)


def test_paddles_extra_inputs_become_constants_and_others_are_refused(tmp_path: Path) -> None:
    net = with_size(64, 64)
    net.inputs.append(helper.make_tensor_value_info("scale_factor", TensorProto.FLOAT, ["batch", 2]))
    imported(layout(net), tmp_path)
    net.inputs.append(helper.make_tensor_value_info("other", TensorProto.FLOAT, ["batch", 2]))
    with pytest.raises(ImportModelError, match="wants 'other'"):
        imported(layout(net), tmp_path)


def test_no_convolution(tmp_path: Path) -> None:
    net = Network({"box": 4})
    net.out(net.add("Relu", net.input), "out", ["batch", 3, 64, 64])
    with pytest.raises(ImportModelError, match="has no convolution"):
        imported(layout(net), tmp_path)


def test_a_graph_that_normalises_takes_plain_pixels(tmp_path: Path) -> None:
    inside = check(tensorflow(front="mean"), tmp_path)
    assert inside.front.normalised
    assert (inside.adapted.picture["mean"], inside.adapted.picture["std"]) == ([0.0] * 3, [1.0] * 3)
    assert not check(two_heads(names=("loc", "conf")), tmp_path).front.normalised


def test_noise_is_what_the_network_expects(tmp_path: Path) -> None:
    for built, lowest, highest in ((tensorflow(), 0, 255), (two_heads(), -2, 2)):
        front = find_front(Editor(tmp_path / "x.onnx", built.model))
        noise = front.noise(2)
        assert noise.shape == (2, 64, 64, 3)
        assert lowest <= noise.min() < noise.max() <= highest
        np.testing.assert_array_equal(noise, front.noise(2))
