"""A graph exported for one picture → the same graph for any number of them, and the check that pictures do not mix.

Exports write a batch of one into the shapes of Reshapes, or drop it with Squeeze and go on without it. The first is
opened by writing another shape. For the second, the batch is kept and every operator behind counts its axes from the
next one, until a node puts the batch back.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build.errors import GraphError, ImportModelError
from build.session import runner

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from numpy.typing import NDArray

_ELEMENTWISE = frozenset(
    (
        *("Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "Exp", "Log", "Sqrt", "Neg", "Abs", "Sigmoid", "Tanh"),
        *("Relu", "LeakyRelu", "HardSigmoid", "Clip", "Cast", "Identity", "Floor", "Ceil", "Round", "Reciprocal"),
        *("Erf", "Softplus", "Where", "Equal", "Greater", "Less", "Not", "And", "Or", "MatMul"),
    )
)
_WITH_AXIS = frozenset(("Concat", "Softmax", "LogSoftmax", "Split", "Gather", "ArgMax", "ArgMin", "TopK"))
_WITH_AXES = frozenset(("Squeeze", "Unsqueeze", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceMean", "ReduceProd"))


def open_batch(path: Path, model: onnx.ModelProto, pixels: NDArray[np.float32]) -> list[str]:
    """Opens a batch of one that is written into the graph (in place).

    Args:
        path: the file, for messages.
        model: FP32 `pixels` [batch,3,H,W] → heads [batch,N,columns].
        pixels: one picture of noise, [1,3,H,W].

    Returns:
        The names of the nodes that were changed.

    Raises:
        ImportModelError: a node needs the batch of one; names it.
    """
    return _Opening(path, model, pixels).run()


class _Opening:
    def __init__(self, path: Path, model: onnx.ModelProto, pixels: NDArray[np.float32]) -> None:
        from onnx import numpy_helper

        self.path, self.model = path, model
        self.constants = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
        self.changed: list[str] = []
        values = _every_tensor(model, pixels)
        self.shapes = {name: array.shape for name, array in values.items()}
        computed = {item.name for item in model.graph.input}
        for node in model.graph.node:
            if any(name in computed for name in node.input):
                computed.update(node.output)
            else:  # made from constants alone
                self.constants |= {name: values[name] for name in node.output if name in values}
        self.pictured = self._reached()
        self.dropped: set[str] = set()  # tensors that had lost the batch, and have it again

    def run(self) -> list[str]:
        for node in self.model.graph.node:
            if not any(name in self.pictured for name in node.input):
                continue
            if any(name in self.dropped for name in node.input):
                self._follow(node)
            elif node.op_type == "Reshape":
                self._reshape(node)
            elif self._drops(node):
                self._identity(node)
                self.dropped.update(node.output)
        return self.changed

    def _reached(self) -> set[str]:
        """Tensors that hold pictures' numbers: behind the input, but not behind a Shape."""
        reached = {self.model.graph.input[0].name}
        for node in self.model.graph.node:
            if node.op_type not in ("Shape", "Size") and any(name in reached for name in node.input):
                reached.update(node.output)
        return reached

    def _reshape(self, node: onnx.NodeProto) -> None:
        shape = self.constants.get(node.input[1])
        before, after = self.shapes.get(node.input[0], ()), self.shapes.get(node.output[0], ())
        if shape is None or not before or before[0] != 1:
            return
        if len(shape) > 1 and shape[0] == 1:
            opened = shape.copy()
            opened[0] = 0 if -1 in shape[1:] else -1
            self._constant(node, 1, opened)
        elif shape.size and shape[0] != 0 and before[1:] == after:  # drops the batch and nothing else
            self._identity(node)
            self.dropped.update(node.output)
        elif -1 not in shape and shape[0] == after[0] != 1 and len(before) > 1:  # [1,N,C] → [N·A,C]: rows of all
            opened = shape.copy()
            opened[0] = -1
            self._constant(node, 1, opened)

    def _follow(self, node: onnx.NodeProto) -> None:
        """A node behind a dropped batch: its axes are counted from the second."""
        import numpy as np

        op_type = node.op_type
        if op_type in ("Squeeze", "Unsqueeze") and self._axes(node) is None:
            raise self._needs(node)
        if op_type == "Unsqueeze" and self._axes(node) == [0]:
            self._identity(node)
            return
        if op_type == "Reshape" and node.input[1] in self.constants:
            shape, size = self.constants[node.input[1]], self.shapes[node.output[0]]
            if shape[0] in (1, -1) and size[0] == 1:
                self._constant(node, 1, np.array([-1 if -1 not in shape[1:] else 0, *shape[1:]]))
                return
            self._constant(node, 1, np.array([0, *shape]))
        elif op_type == "Transpose":
            rank = len(self.shapes[node.input[0]])
            perm = next((list(a.ints) for a in node.attribute if a.name == "perm"), list(range(rank))[::-1])
            self._attribute(node, "perm", [0, *(place + 1 for place in perm)])
        elif op_type in _WITH_AXIS:
            if op_type == "Gather" and node.input[0] not in self.dropped:
                raise self._needs(node)
            axis = self._axis(node)
            self._attribute(node, "axis", axis + 1 if axis >= 0 else axis)
        elif op_type in _WITH_AXES or op_type == "Slice":
            place = {"Slice": 3}.get(op_type, 1)
            axes = self._axes(node, place)
            if axes is None:
                raise self._needs(node)
            moved = [axis + 1 if axis >= 0 else axis for axis in axes]
            if any(a.name == "axes" for a in node.attribute):
                self._attribute(node, "axes", moved)
            else:
                self._constant(node, place, np.array(moved))
        elif op_type not in _ELEMENTWISE:
            raise self._needs(node)
        self.dropped.update(node.output)
        if node.name not in self.changed:
            self.changed.append(node.name)

    def _needs(self, node: onnx.NodeProto) -> ImportModelError:
        return ImportModelError(
            f"{self.path}: is exported for a batch of one, and its node {_called(node)} cannot work on more",
            why="the batch was dropped before it",
            fix="export it with an open batch (torch.onnx.export: dynamic_axes={'input': {0: 'batch'}, ...})",
        )

    def _drops(self, node: onnx.NodeProto) -> bool:
        """Whether a node takes the batch away and does nothing else."""
        if node.op_type == "Gather":
            return self._axis(node) == 0 and self._is(node.input[1], 0)
        if node.op_type != "Squeeze":
            return False
        axes = self._axes(node)
        size = self.shapes.get(node.input[0], ())
        rank = len(size)
        if axes is None:
            axes = [place for place, length in enumerate(size) if length == 1]
        places = sorted(axis % rank for axis in axes) if rank else []
        if places[:1] != [0]:
            return False
        if len(places) > 1:
            self._axes_only(node, places[1:])
            return False
        return True

    def _axes_only(self, node: onnx.NodeProto, places: list[int]) -> None:
        """A Squeeze of the batch and more: of the rest alone; a consumer that needs the batch gone fails the check."""
        import numpy as np

        if any(a.name == "axes" for a in node.attribute):
            self._attribute(node, "axes", places)
        elif len(node.input) > 1:
            self._constant(node, 1, np.array(places))
        self.dropped.update(node.output)
        self.changed.append(node.name)

    # -- reading and writing nodes -------------------------------------------------------------------------------------

    def _axis(self, node: onnx.NodeProto) -> int:
        default = {"Gather": 0, "Split": 0, "ArgMax": 0, "ArgMin": 0}.get(node.op_type, -1)
        return next((int(a.i) for a in node.attribute if a.name == "axis"), default)

    def _axes(self, node: onnx.NodeProto, place: int = 1) -> list[int] | None:
        given = next((list(a.ints) for a in node.attribute if a.name == "axes"), None)
        if given is None and len(node.input) > place and node.input[place] in self.constants:
            given = [int(axis) for axis in self.constants[node.input[place]].ravel()]
        return given

    def _is(self, name: str, number: int) -> bool:
        value = self.constants.get(name)
        return value is not None and value.ndim == 0 and int(value) == number

    def _identity(self, node: onnx.NodeProto) -> None:
        del node.input[1:], node.attribute[:]
        node.op_type = "Identity"
        self.changed.append(node.name)

    def _attribute(self, node: onnx.NodeProto, name: str, value: Any) -> None:
        from onnx import helper

        kept = [item for item in node.attribute if item.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute(name, value)])

    def _constant(self, node: onnx.NodeProto, place: int, value: NDArray[Any]) -> None:
        from onnx import numpy_helper

        name = f"{node.name or node.output[0]}/open_{place}"
        self.constants[name] = value.astype("int64")
        self.model.graph.initializer.append(numpy_helper.from_array(self.constants[name], name))
        node.input[place] = name
        if node.name not in self.changed:
            self.changed.append(node.name)


def check_batch(path: Path, model: onnx.ModelProto, pixels: NDArray[np.float32]) -> None:
    """Two pictures at once give what each gives alone.

    Args:
        path: the file, for messages.
        model: as for `open_batch`.
        pixels: two pictures of noise, [2,3,H,W].

    Raises:
        ImportModelError: they do not, or two cannot run; names the first node that mixes them.
    """
    run = runner(model)
    name = model.graph.input[0].name
    alone = [run({name: pixels[i : i + 1]}) for i in range(2)]
    fix = "export it with an open batch (torch.onnx.export: dynamic_axes={'input': {0: 'batch'}, ...})"
    try:
        both = run({name: pixels})
    except Exception as error:  # ONNX Runtime's own exceptions have no common type
        called = re.search(r"running (\w+) node\. Name:'([^']*)'", str(error))
        place = f"its node {called[2]!r} ({called[1]})" if called else "one of its nodes"
        raise ImportModelError(
            f"{path}: works on one picture only: {place} fails for two",
            why="the export wrote the batch of one into the graph",
            fix=fix,
        ) from None
    if all(_stacked(both[head], *(single[head] for single in alone)) for head in both):
        return
    first, second = (_every_tensor(model, pixels[i : i + 1]) for i in range(2))
    together = _every_tensor(model, pixels)
    for node in model.graph.node:
        for output in node.output:
            arrays = [values.get(output) for values in (together, first, second)]
            if any(array is None or array.dtype.kind != "f" for array in arrays):
                continue
            if not _stacked(*arrays):  # type: ignore[arg-type]
                raise ImportModelError(
                    f"{path}: mixes the pictures of a batch: its node {_called(node)} gives other values for two "
                    "pictures than for each alone",
                    why="it works across the batch, or the export wrote a batch of one into it",
                    fix=fix,
                )
    raise ImportModelError(f"{path}: mixes the pictures of a batch", fix=fix)


def _stacked(both: NDArray[Any], first: NDArray[Any], second: NDArray[Any]) -> bool:
    """Whether a tensor of two pictures is those of each, one after the other; or the same for every picture."""
    import numpy as np

    def close(a: NDArray[Any], b: NDArray[Any]) -> bool:
        return a.shape == b.shape and bool(np.allclose(a, b, rtol=1e-3, atol=1e-4, equal_nan=True))

    if both.ndim and first.ndim and both.shape[0] == 2 * first.shape[0]:
        return close(both, np.concatenate([first, second]))
    return close(both, first) and close(both, second)


def _every_tensor(model: onnx.ModelProto, pixels: NDArray[np.float32]) -> Mapping[str, NDArray[Any]]:
    """Every tensor that a run computes; only outputs where not all of them can be had."""
    import onnx

    extended = onnx.ModelProto()
    extended.CopyFrom(model)
    present = {output.name for output in extended.graph.output}
    names = {name for node in extended.graph.node for name in node.output if name} - present
    extended.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(names))
    feeds = {model.graph.input[0].name: pixels}
    try:
        return runner(extended, optimised=False)(feeds)
    except GraphError:
        return runner(model)(feeds)


def _called(node: onnx.NodeProto) -> str:
    return f"{node.name!r} ({node.op_type})" if node.name else f"{node.op_type} that makes {node.output[0]!r}"
