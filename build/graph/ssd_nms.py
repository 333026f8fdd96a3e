"""SSDNMS as an ONNX model-local function of standard ops: the reference semantics of docs/design.md, made to run fast.

`attach` puts one SSDNMS node and its function into a model, so that any ONNX runtime can run the file; `strip_function`
takes the function out again, so that TensorRT's parser resolves the node to the CUDA plugin instead.

The way of one image through the function: a cheap bound on the raw logits picks the few anchors that can hold a
candidate, and only those are activated; only those that the cap leaves to a class are decoded and suppressed. A Scan
goes over the rows of the batch, each with its own thresholds; no row sees another.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from build.contract import DOMAIN, NMS_INPUTS, OP_TYPE, OP_VERSION, OUTPUTS, THRESHOLDS, Nms
from build.errors import GraphError
from build.tables import INT32_MAX

if TYPE_CHECKING:
    import onnx

# The function refers to these attributes of its node; on the others its very structure depends.
_NUMERIC = (
    *("score_threshold", "iou_threshold", "max_detections", "topk_per_class", "box_scales"),
    "lowest_score_threshold",
)
_EVERYTHING = INT32_MAX


def node(nms: Nms, inputs: Sequence[str], outputs: Sequence[str] = OUTPUTS, name: str = "ssd/nms") -> onnx.NodeProto:
    """One SSDNMS node with every attribute written out.

    Args:
        nms: the attributes; `runtime_thresholds` says whether there are five inputs or three.
        inputs: names of box_deltas, class_logits, anchors and, if asked for, score_threshold and iou_threshold.
        outputs: names of the four outputs.

    Raises:
        GraphError: the number of inputs does not fit `nms.runtime_thresholds`.
    """
    from onnx import helper

    wanted = (*NMS_INPUTS, *THRESHOLDS) if nms.runtime_thresholds else NMS_INPUTS
    if len(inputs) != len(wanted):
        raise GraphError(f"{OP_TYPE} node {name!r} has {len(inputs)} inputs, but must have {len(wanted)}: {wanted}")
    return helper.make_node(OP_TYPE, inputs, outputs, name=name, domain=DOMAIN, **nms.attributes())


def nms_of(ssd_node: onnx.NodeProto) -> Nms:
    """The attributes of an SSDNMS node, checked.

    Raises:
        GraphError: an attribute is unknown, of the wrong type or out of its range.
    """
    from onnx import helper

    known = {item.name: item for item in dataclasses.fields(Nms)}
    values: dict[str, Any] = {"runtime_thresholds": len(ssd_node.input) == len(NMS_INPUTS) + len(THRESHOLDS)}
    for attribute in ssd_node.attribute:
        value = helper.get_attribute_value(attribute)
        if attribute.name not in known or attribute.name == "runtime_thresholds":
            raise GraphError(f"{OP_TYPE} node {ssd_node.name!r} has an unknown attribute {attribute.name!r}")
        value = value.decode() if isinstance(value, bytes) else value
        values[attribute.name] = bool(value) if isinstance(known[attribute.name].default, bool) else value
    try:
        return Nms(**values)
    except ValueError as error:
        raise GraphError(f"{OP_TYPE} node {ssd_node.name!r}: {error}") from None


def attach(model: onnx.ModelProto, ssd_node: onnx.NodeProto) -> None:
    """Appends the node to the model's graph, and its function and the domain to the model (in place)."""
    from onnx import helper

    model.graph.node.append(ssd_node)
    opset = next(item.version for item in model.opset_import if item.domain in ("", "ai.onnx"))
    model.functions.append(function(nms_of(ssd_node), opset))
    model.opset_import.append(helper.make_opsetid(DOMAIN, OP_VERSION))


def find(model: onnx.ModelProto) -> onnx.NodeProto:
    """The SSDNMS node of a model, checked against the function that the model carries.

    Raises:
        GraphError: there is not exactly one such node, an attribute is out of range, or the function was authored for
            another structure than the node's attributes ask for.
    """
    nodes = [n for n in model.graph.node if n.op_type == OP_TYPE and n.domain == DOMAIN]
    if len(nodes) != 1:
        raise GraphError(
            f"the model has {len(nodes)} {OP_TYPE} nodes, but must have one", fix="attach one (build/graph/attach.py)"
        )
    wanted = _structure(nms_of(nodes[0]))
    for carried in model.functions:
        if (carried.domain, carried.name) == (DOMAIN, OP_TYPE) and carried.doc_string != wanted:
            raise GraphError(
                f"the {OP_TYPE} function was authored for {carried.doc_string}, but its node asks for {wanted}",
                why="an attribute of the node was edited after the function was made",
                fix="build the model again",
            )
    return nodes[0]


def strip_function(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without the local function: what TensorRT's parser needs to take the plugin for the node."""
    import onnx

    stripped = onnx.ModelProto()
    stripped.CopyFrom(model)
    kept = [carried for carried in model.functions if (carried.domain, carried.name) != (DOMAIN, OP_TYPE)]
    del stripped.functions[:]
    stripped.functions.extend(kept)
    return stripped


def _structure(nms: Nms) -> str:
    """The settings that the function's structure depends on, as the function's doc string carries them."""
    values: Mapping[str, Any] = nms.attributes()
    structure = {name: value for name, value in values.items() if name not in _NUMERIC}
    return json.dumps({**structure, "capped": nms.topk_per_class > 0, "runtime_thresholds": nms.runtime_thresholds})


def function(nms: Nms, opset: int) -> onnx.FunctionProto:
    """Authors the function: FP32 or FP16 [B,N,4] and [B,N,C], FP32 [N,4], thresholds FP32 [B,1] → the four outputs.

    Thresholds, K, the cap and the box scales are referred to as the node's attributes; everything else of `nms` is
    resolved here (`find` tells a node that disagrees). A iou_threshold input below 0 acts as 0, above 1 or NaN as 1.

    Args:
        nms: the attributes.
        opset: the model's version of the standard operators, 13 or later: a function may not use another one.
    """
    from onnxscript import build_function, ir

    kinds = {int: ir.AttributeType.INT, float: ir.AttributeType.FLOAT, str: ir.AttributeType.STRING}
    declared = [
        ir.Attr(name, kinds.get(type(value), ir.AttributeType.FLOATS), value)
        for name, value in Nms().attributes().items()
    ]
    names = (*NMS_INPUTS, *THRESHOLDS) if nms.runtime_thresholds else NMS_INPUTS
    built = build_function(
        lambda op, *inputs: _batch(op, nms, *inputs),
        [ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT)) for name in names],
        domain=DOMAIN,
        name=OP_TYPE,
        attributes=declared,
        opset_imports={"": opset},
    )
    for value, name in zip(built.outputs, OUTPUTS, strict=True):
        value.name = name
    proto: onnx.FunctionProto = ir.to_proto(built)
    proto.doc_string = _structure(nms)
    return proto


def _batch(
    op: Any, nms: Nms, deltas: Any, logits: Any, anchors: Any, score: Any = None, iou: Any = None
) -> Sequence[Any]:
    """The whole batch: what rows share, and the Scan over them."""
    from onnxscript import ir

    kinds = {"max_detections": "INT", "box_scales": "FLOATS", "lowest_score_threshold": "FLOAT"}
    kinds |= {"topk_per_class": "INT"} if nms.topk_per_class else {}
    kinds |= {} if nms.runtime_thresholds else dict.fromkeys(THRESHOLDS, "FLOAT")
    attribute = {}
    for name, kind in kinds.items():
        value_kind = f"value_{kind.lower()}"
        attribute[name] = op.Constant(**{value_kind: ir.RefAttr(value_kind, name, ir.AttributeType[kind])})
    lowest = attribute["lowest_score_threshold"]

    def effective(op: Any, asked: Any) -> Any:
        return op.Where(op.Less(asked, lowest), lowest, asked)  # not Max: NaN stays NaN

    rows = [op.Cast(deltas, to=ir.DataType.FLOAT), op.Cast(logits, to=ir.DataType.FLOAT)]
    if nms.runtime_thresholds:
        most = op.Constant(value_float=1.0)
        rows += [
            effective(op, score),
            op.Where(op.Less(iou, most), op.Max(iou, op.Constant(value_float=0.0)), most),
        ]

    def row(op: Any, deltas: Any, logits: Any, *thresholds: Any) -> Sequence[Any]:
        op.builder.push_module("row")  # names of its own: a subgraph must not repeat those around it
        # Of what is around it, OpenVINO's Scan takes constants only: what is computed must be computed inside.
        score, iou = thresholds or (effective(op, attribute["score_threshold"]), attribute["iou_threshold"])
        return _Row(op, nms, attribute, score, iou).detections(deltas, logits, anchors)

    def value(name: str, dtype: Any, *shape: int | str) -> Any:
        return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))

    number, real = ir.DataType.INT32, ir.DataType.FLOAT
    body = op.builder.subgraph(
        row,
        [
            value("row_deltas", real, "N", 4),
            value("row_logits", real, "N", "C"),
            *(value(f"row_{name}", real, 1) for name in THRESHOLDS[: len(rows) - 2]),
        ],
        [
            value("row_number", number, 1),
            value("row_boxes", real, "K", 4),
            value("row_scores", real, "K"),
            value("row_classes", number, "K"),
        ],
        name="row",
    )
    outputs: Sequence[Any] = op.Scan(*rows, body=body, num_scan_inputs=len(rows), _outputs=4)
    return outputs


class _Row:
    """The graph for one image; `op` makes nodes, `score` and `iou` are its thresholds (one element each)."""

    def __init__(self, op: Any, nms: Nms, attribute: Mapping[str, Any], score: Any, iou: Any) -> None:
        self.op, self.nms, self.attribute, self.score, self.iou = op, nms, attribute, score, iou
        self._constants: dict[float | tuple[int, ...], Any] = {}

    def real(self, value: float) -> Any:
        if value not in self._constants:
            self._constants[value] = self.op.Constant(value_float=value)
        return self._constants[value]

    def whole(self, *values: int) -> Any:
        if values not in self._constants:
            self._constants[values] = self.op.Constant(value_ints=values)
        return self._constants[values]

    def columns(self, table: Any, start: int, end: int = _EVERYTHING) -> Any:
        return self.op.Slice(table, self.whole(start), self.whole(end), self.whole(1))

    def detections(self, deltas: Any, logits: Any, anchors: Any) -> Sequence[Any]:
        """Deltas [N,4] and logits [N,C] of one image → number [1], boxes [K,4], scores [K], classes [K]."""
        op = self.op
        likely = op.Reshape(op.NonZero(self.may_hold_candidate(logits)), self.whole(-1))
        scores = op.Transpose(self.foreground(self.activate(op.Gather(logits, likely))), perm=[1, 0])
        if self.nms.topk_per_class:
            scores = self.cap(scores)
            # With a low threshold nearly every anchor is likely, but few are among the best of a class.
            held = op.Greater(self.maximum(scores, 0), self.score)
            kept = op.Reshape(op.NonZero(op.Reshape(held, self.whole(-1))), self.whole(-1))
            scores, likely = op.Gather(scores, kept, axis=1), op.Gather(likely, kept)
        boxes = self.decode(op.Gather(deltas, likely), op.Gather(anchors, likely))
        place, label, score = self.suppress(boxes, scores)

        most = op.Reshape(self.attribute["max_detections"], self.whole(-1))
        count = op.Min(op.Shape(score), most)
        # `suppress` answers by class, then score, then anchor; TopK takes the first of equals.
        best, order = op.TopK(score, count, _outputs=2)
        nothing, rest = self.whole(0), op.Sub(most, count)
        at_end = op.Concat(nothing, rest, axis=0)
        boxes = op.Gather(boxes, op.Gather(place, order))
        number = op.Cast(count, to=6)
        classes = op.Cast(op.Gather(label, order), to=6)
        return [
            number,
            op.Pad(boxes, op.Concat(nothing, nothing, rest, nothing, axis=0)),
            op.Pad(best, at_end),
            op.Pad(classes, at_end, op.Cast(self.whole(-1), to=6)),
        ]

    def may_hold_candidate(self, logits: Any) -> Any:
        """Bool [N]: true for every anchor with a candidate, and for few others. NaN where it could mean one is true."""
        op, nms = self.op, self.nms
        if nms.score_activation == "none":
            best, bound = logits, self.score
        elif nms.score_activation == "softmax" and nms.background_class < 0:
            best, bound = op.Softmax(logits), op.Sub(self.score, self.real(1e-6))
        else:
            # A score p > t needs a logit of more than log(t / (1 - t)), for softmax above the background's logit:
            # p = 1 / (1 + exp(background - logit) + ...). The margins are far wider than any rounding of the score.
            low = op.Max(op.Sub(self.score, self.real(1e-6)), self.real(0.0))
            best, bound = logits, op.Sub(op.Log(op.Div(low, op.Sub(self.real(1.0), low))), self.real(1e-3))
        best = self.foreground(best)
        best = self.maximum(best, 1)
        if nms.score_activation == "softmax":
            if nms.background_class >= 0:
                background = self.columns_at(logits, nms.background_class)
                best = op.Sub(best, background)
            above = op.Greater(best, bound)  # a NaN makes the anchor's whole softmax NaN: no candidate
        else:
            # A NaN takes away one class only; then ReduceMax says nothing about the others.
            total = op.ReduceSum(logits, self.whole(1))
            above = op.Or(op.Greater(best, bound), op.IsNaN(total))
        return op.Reshape(above, self.whole(-1))

    def maximum(self, table: Any, axis: int) -> Any:
        """Along an axis of [N,C], which stays with the size 1."""
        op = self.op
        # From version 18 on the axes are an input.
        return op.ReduceMax(table, self.whole(axis)) if op.version >= 18 else op.ReduceMax(table, axes=[axis])

    def columns_at(self, table: Any, column: int) -> Any:
        """[N,1] of [N,C]."""
        op = self.op
        return op.Slice(table, self.whole(column), self.whole(column + 1), self.whole(1))

    def foreground(self, table: Any) -> Any:
        """[N,C'] of [N,C]: without the background's column."""
        background = self.nms.background_class
        if background < 0:
            return table
        after = self.columns(table, background + 1)
        return self.op.Concat(self.columns(table, 0, background), after, axis=1) if background else after

    def activate(self, logits: Any) -> Any:
        """Step 1."""
        kind = self.nms.score_activation
        return logits if kind == "none" else self.op.Softmax(logits) if kind == "softmax" else self.op.Sigmoid(logits)

    def decode(self, deltas: Any, anchors: Any) -> Any:
        """Step 2: [M,4] x1,y1,x2,y2."""
        op = self.op
        moves = op.Div(deltas, self.attribute["box_scales"])
        half = self.real(0.5)
        centre, size = self.columns(anchors, 0, 2), self.columns(anchors, 2)
        first, second = self.columns(moves, 0, 2), self.columns(moves, 2)
        if self.nms.box_coding == "center_size":
            centre = op.Add(op.Mul(first, size), centre)
            size = op.Mul(half, op.Mul(op.Exp(second), size))
            boxes = op.Concat(op.Sub(centre, size), op.Add(centre, size), axis=1)
        else:
            size = op.Mul(half, size)
            boxes = op.Add(op.Concat(op.Sub(centre, size), op.Add(centre, size), axis=1), moves)
        if self.nms.clip_boxes:
            low, high = self.real(0.0), self.real(1.0)
            boxes = op.Where(op.Greater(boxes, low), boxes, low)
            boxes = op.Where(op.Less(boxes, high), boxes, high)
        return boxes

    def cap(self, scores: Any) -> Any:
        """Step 3: [C',M] with -inf for all but the best candidates of each class; TopK takes the first of equals."""
        op = self.op
        nothing = self.real(float("-inf"))
        candidates = op.Where(op.Greater(scores, self.score), scores, nothing)
        anchors = op.Slice(op.Shape(scores), self.whole(1), self.whole(2))
        most = op.Min(op.Reshape(self.attribute["topk_per_class"], self.whole(-1)), anchors)
        best, place = op.TopK(candidates, most, sorted=0, _outputs=2)
        return op.ScatterElements(op.Expand(nothing, op.Shape(scores)), place, best, axis=1)

    def suppress(self, boxes: Any, scores: Any) -> tuple[Any, Any, Any]:
        """Step 4 on boxes [M,4] and scores [C',M] → place in M, class and score of the kept, in any of class order."""
        op = self.op
        low, high = self.columns(boxes, 0, 2), self.columns(boxes, 2)
        # NonMaxSuppression would turn flipped corners; they stay without area.
        upright = op.Concat(low, op.Where(op.Greater(high, low), high, low), axis=1)
        batch = self.whole(0)
        if not self.nms.class_agnostic:
            kept = op.NonMaxSuppression(
                op.Unsqueeze(upright, batch),
                op.Unsqueeze(scores, batch),
                self.attribute["max_detections"],
                self.iou,
                self.score,
            )
            pair = self.columns(kept, 1)
            return self.column(kept, 2), self.column(kept, 1), op.GatherND(scores, pair)
        pairs = op.NonZero(op.Greater(scores, self.score))  # by class, then anchor: the order of equals
        label, place = (op.Gather(pairs, op.Constant(value_int=row)) for row in (0, 1))
        flat = op.GatherND(scores, op.Transpose(pairs, perm=[1, 0]))
        kept = op.NonMaxSuppression(
            op.Unsqueeze(op.Gather(upright, place), batch),
            op.Unsqueeze(flat, self.whole(0, 1)),
            self.attribute["max_detections"],
            self.iou,
        )
        index = self.column(kept, 2)
        return op.Gather(place, index), op.Gather(label, index), op.Gather(flat, index)

    def column(self, table: Any, column: int) -> Any:
        """[S] of [S,3]."""
        return self.op.Reshape(self.columns_at(table, column), self.whole(-1))
