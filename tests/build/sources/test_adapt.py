"""What an adapted file is: its tensors, settings and what is usual where nothing tells."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.build.sources.checks import imported
from tests.build.sources.layouts import Layout
from tests.build.sources.layouts_without_nms import two_heads
from tests.build.sources.networks import BOXES, Network, anchors


@pytest.mark.parametrize("picture", ["float32", "float16", "uint8"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_every_input_becomes_the_same(picture: str, channels_last: bool, tmp_path: Path) -> None:
    layout = two_heads(names=("loc", "conf"), picture=picture, channels_last=channels_last, opset=11)
    model = imported(layout, tmp_path).adapted.model
    onnx.checker.check_model(model, full_check=True)
    (given,) = model.graph.input
    assert given.name == "pixels"
    assert given.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert [dim.dim_param or dim.dim_value for dim in given.type.tensor_type.shape.dim] == ["batch", 3, 64, 64]
    shapes = {o.name: [d.dim_param or d.dim_value for d in o.type.tensor_type.shape.dim] for o in model.graph.output}
    assert shapes == {"box_deltas": ["batch", BOXES, 4], "class_logits": ["batch", BOXES, 4]}
    assert [item.domain for item in model.opset_import] == [""]


@pytest.mark.parametrize(("columns", "background", "activation"), [(4, 0, "softmax"), (3, -1, "sigmoid")])
def test_logits_have_the_activation_that_is_usual(
    columns: int, background: int, activation: str, tmp_path: Path
) -> None:
    net = Network({"box": 4, "cls": columns})
    net.out(net.rows("box"), "loc", ["batch", BOXES, 4])
    net.out(net.rows("cls"), "conf", ["batch", BOXES, columns])
    foreign = imported(Layout(net.build(), 3, lambda x: (x, x), "", table=anchors()), tmp_path)
    assert foreign.adapted.nms["background_class"] == background
    assert foreign.adapted.nms["score_activation"] == activation
    (said,) = [where for what, _, where in foreign.reading.facts if what == "score_activation"]
    assert said.startswith("usual with")


def test_raw_heads_keep_no_decoding(tmp_path: Path) -> None:
    layout = two_heads(names=("boxes", "scores"), decode="xyxy", activation="Softmax")
    foreign = imported(layout, tmp_path)
    assert not {"Exp", "Softmax", "Mul", "Div"} & {node.op_type for node in foreign.adapted.model.graph.node}
    assert foreign.adapted.anchors is not None
    np.testing.assert_allclose(foreign.adapted.anchors, anchors(), rtol=1e-5)
