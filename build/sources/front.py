"""Where a foreign network takes its pixels: past the preprocessing that some exports carry inside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from build.errors import ImportModelError, OptionError
from build.sources.editor import Editor

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray

_ARITHMETIC = frozenset(("Add", "Sub", "Mul", "Div", "BatchNormalization", "Pad"))
_NORMALISING = frozenset(("Add", "Sub", "Mul", "Div"))  # a BatchNormalization was trained on what stood before it
_CONVOLUTIONS = ("Conv", "ConvInteger", "QLinearConv")
# What PaddleDetection's exports ask beside the picture, as the numbers for a picture at the network's own size.
_EXTRA = ("scale_factor", "im_shape")


@dataclass(frozen=True)
class Front:
    """The network's own input.

    Attributes:
        pixels: the tensor that stands for the picture.
        channels_last: whether it is [B,H,W,3] and not [B,3,H,W].
        height, width: in pixels.
        dtype: NumPy's name of its type.
        normalised: whether the graph normalises behind it, so that it takes plain pixel values.
        cut: the operator that the graph was cut behind; empty where `pixels` is the graph's input.
        picture: the graph's own input, before the cut.
        names: of `pixels` and `picture` in the file; an adaptation renames them.
    """

    pixels: ir.Value
    channels_last: bool
    height: int
    width: int
    dtype: str
    normalised: bool
    cut: str
    picture: ir.Value
    names: tuple[str, str]

    def feeds(self, pixels: NDArray[np.generic]) -> dict[str, NDArray[Any]]:
        """Pictures [B,H,W,3] as the network takes them, values as they are."""
        import numpy as np

        array = pixels if self.channels_last else pixels.transpose(0, 3, 1, 2)
        return {self.names[0]: np.ascontiguousarray(array.astype(self.dtype))}

    def noise(self, count: int, seed: int = 0) -> NDArray[np.float32]:
        """Pictures of noise [count,H,W,3] as the network takes them: normalised, where it does not do that itself."""
        import numpy as np

        pixels = np.random.default_rng(seed).uniform(0, 255, (count, self.height, self.width, 3))
        return (pixels.round() if self.normalised else (pixels - 127.5) / 64).astype(np.float32)

    def example(self) -> dict[str, NDArray[Any]]:
        """The feeds of one picture of noise, for measuring sizes."""
        import numpy as np

        pixels = self.noise(1)
        if not self.cut:
            return self.feeds(pixels)
        last = list(self.picture.shape or ())[-1] == 3  # the whole graph, with the preprocessing that is cut off later
        array = pixels if last else pixels.transpose(0, 3, 1, 2)
        return {self.names[1]: np.ascontiguousarray(array.astype(self.picture.dtype.numpy()))}  # type: ignore[union-attr]


def find_front(editor: Editor, width: int = 0, height: int = 0) -> Front:
    """Finds where the network begins.

    Args:
        editor: the graph; inputs beside the picture become constants.
        width, height: as the user gives them; 0 = as the graph has them.

    Raises:
        ImportModelError: there is no convolution, or the picture's input cannot be told.
        OptionError: the graph does not say the size.
    """
    picture = _picture(editor)
    convolution = next((node for node in editor.graph if node.op_type in _CONVOLUTIONS), None)
    if convolution is None:
        raise ImportModelError(f"{editor.path}: has no convolution", fix="give the ONNX file of a detector")
    passed: list[ir.Node] = []

    def elementwise(node: ir.Node) -> bool:
        fits = node.op_type in _ARITHMETIC | {"Transpose", "Cast", "Identity"}
        if fits:
            passed.append(node)
        return fits

    def picture_side(node: ir.Node) -> int:
        variable = [i for i, read in enumerate(node.inputs) if read is not None and editor.constant(read) is None]
        return variable[0] if variable else 0

    start = convolution.inputs[0]
    assert start is not None
    pixels = editor.back(start, elementwise, picture_side)
    producer = pixels.producer()
    if pixels is not picture and picture not in editor.ancestors(pixels):
        raise ImportModelError(
            f"{editor.path}: its first convolution {convolution.name!r} does not depend on the input {picture.name!r}",
            fix="export the network with its picture as the one input",
        )
    shape = list(picture.shape or ())
    sizes = [size if isinstance(size, int) else 0 for size in shape]
    turns = any(n.op_type == "Transpose" and list(n.attributes["perm"].as_ints()) == [0, 3, 1, 2] for n in passed)
    channels_last = turns or (not producer and len(sizes) == 4 and sizes[3] == 3 and sizes[1] != 3)
    rows, columns = (1, 2) if channels_last else (2, 3)
    inside = _resize(editor) if producer else (sizes[rows], sizes[columns]) if len(sizes) == 4 else (0, 0)
    tall, wide = height or inside[0], width or inside[1]
    if not (tall and wide):
        raise OptionError(
            f"{editor.path}: input {picture.name!r} is {_shown(shape)}, which leaves height and width open",
            fix="say them: --set input.width=300 --set input.height=300",
        )
    if not producer and any(
        given and fixed and given != fixed for given, fixed in zip((tall, wide), inside, strict=True)
    ):
        raise OptionError(
            f"{editor.path}: input {picture.name!r} is {_shown(shape)}, but {wide} x {tall} was asked for",
            fix="leave input.width and input.height out, or export the network for that size",
        )
    import onnx_ir as ir

    kind = picture.dtype if not producer else ir.DataType.FLOAT
    dtype = "uint8" if kind == ir.DataType.UINT8 else "float32"
    normalised = dtype == "uint8" or bool(producer) or any(n.op_type in _NORMALISING for n in passed)
    cut = f"{producer.op_type} {producer.name!r}" if producer else ""
    names = (str(pixels.name), str(picture.name))
    return Front(pixels, channels_last, tall, wide, dtype, normalised, cut, picture, names)


def new_input(editor: Editor, front: Front) -> ir.Value:
    """Puts a new FP32 input [batch,3,H,W] in the place of the network's own; gives it."""
    import onnx_ir as ir

    pixels = ir.Value(
        name="pixels", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch", 3, front.height, front.width])
    )
    for other in editor.values().values():
        if other.name == "pixels":
            other.name = "source/pixels"
    readers = list(front.pixels.uses())
    value = editor.transpose(pixels, 0, 2, 3, 1) if front.channels_last else pixels
    if front.dtype == "uint8":
        value = editor.op("Cast", value, to=ir.DataType.UINT8.value)
    for node, index in readers:
        node.replace_input_with(index, value)
    editor.graph.inputs.append(pixels)
    return pixels


def _picture(editor: Editor) -> ir.Value:
    """The input that takes the picture; the others become constants.

    Raises:
        ImportModelError: another input has no known value.
    """
    inputs = editor.inputs()
    pictures = [value for value in inputs if value.shape is None or len(value.shape) == 4]
    if len(pictures) != 1:
        listed = ", ".join(f"{value.name!r} {_shown(value.shape)}" for value in inputs)
        raise ImportModelError(
            f"{editor.path}: has the inputs {listed}",
            why="one of four dimensions must be the picture",
            fix="export the network with its picture as the one input",
        )
    picture = pictures[0]
    sizes = [size if isinstance(size, int) else 0 for size in picture.shape or ()]
    for other in inputs:
        if other is picture:
            continue
        if other.name not in _EXTRA:
            raise ImportModelError(
                f"{editor.path}: wants {other.name!r} {_shown(other.shape)} beside the picture: its value is unknown",
                fix="export the network with its picture as the one input",
            )
        values = [[1.0, 1.0]] if other.name == "scale_factor" else [[float(sizes[2]), float(sizes[3])]]
        other.replace_all_uses_with(editor.number(values))
    return picture


def _resize(editor: Editor) -> tuple[int, int]:
    """The constant size of a Resize inside the graph: (height, width); zeros where there is none."""
    import numpy as np

    for node in editor.nodes("Resize", "Upsample"):
        sizes = node.inputs[3] if len(node.inputs) > 3 else None
        producer = sizes.producer() if sizes is not None else None
        parts = list(producer.inputs) if producer is not None and producer.op_type == "Concat" else [sizes]
        for part in reversed(parts):
            value = editor.constant(part)
            if value is not None and np.asarray(value).size >= 2:
                height, width = (int(number) for number in np.asarray(value).ravel()[-2:])
                if height > 3 and width > 3:
                    return height, width
    return 0, 0


def _shown(shape: Any) -> str:
    return "[" + ", ".join(str(size) for size in shape or ()) + "]"
