"""A detector's ONNX file, as its framework exported it → what the build takes, with a table of what was recognised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build.errors import ImportModelError, OptionError
from build.sources import anchors as anchor_forms
from build.sources.adapt import Adapted, adapt
from build.sources.decoding import BOX_ORDERS
from build.sources.editor import Editor
from build.sources.front import Front, find_front
from build.sources.reading import IN_PIXELS, USUAL, Reading
from build.sources.recognise import recognise
from build.sources.symptoms import check_values

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from numpy.typing import NDArray
    from rich.table import Table

BOXES_ARE = ("deltas", "decoded")
SCORES_ARE = ("logits", "probabilities")
_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class Wishes:
    """What the user says about a file; empty = the file itself tells.

    Attributes:
        family: of recognise.FAMILIES.
        boxes, logits: tensors of the main graph.
        anchors: a file or a generator (build/sources/anchors.py).
        box_order: of BOX_ORDERS.
        boxes_are: of BOXES_ARE.
        scores_are: of SCORES_ARE.
        width, height: of the input, in pixels.
    """

    family: str = ""
    boxes: str = ""
    logits: str = ""
    anchors: str = ""
    box_order: str = ""
    boxes_are: str = ""
    scores_are: str = ""
    width: int = 0
    height: int = 0

    def __post_init__(self) -> None:
        for name, known in (("box_order", BOX_ORDERS), ("boxes_are", BOXES_ARE), ("scores_are", SCORES_ARE)):
            value = getattr(self, name)
            if value and value not in known:
                raise OptionError(f"--{name.replace('_', '-')} is {value!r}, but must be one of {', '.join(known)}")


@dataclass(frozen=True)
class Foreign:
    """A file that was understood.

    Attributes:
        path: the file.
        adapted: what the build takes.
        reading: what it was recognised as.
        front: where its pixels come in.
        original: the graph as it was.
    """

    path: Path
    adapted: Adapted
    reading: Reading
    front: Front
    original: onnx.ModelProto

    def table(self) -> Table:
        """What was recognised, and from which nodes."""
        from rich.table import Table

        caption = f"{USUAL} the file does not say it, and for {self.reading.family} it is mostly so; --set changes it"
        table = Table(
            title=f"recognised: {self.reading.family}",
            title_justify="left",
            box=None,
            caption=caption if any(source.startswith(USUAL) for *_, source in self.reading.facts) else None,
            caption_justify="left",
        )
        for column in ("what", "value", "from"):
            table.add_column(column, overflow="fold")
        for fact in self.reading.facts:
            table.add_row(*fact)
        return table


def understand(path: Path, labels: Sequence[str], wishes: Wishes = Wishes()) -> Foreign:
    """Recognises a file and adapts it.

    Args:
        path: the ONNX file.
        labels: the foreground labels.
        wishes: what the user says.

    Raises:
        ImportModelError: it is not understood, or contradicts what was said.
        OptionError: something that it does not say must be said; names the option.
    """
    model = load(path)
    editor = Editor(path, model)
    front = find_front(editor, wishes.width, wishes.height)
    _check_fixed_batch(editor, front)
    if wishes.boxes and wishes.boxes == wishes.logits:
        raise OptionError(
            f"{path}: --boxes and --logits both name {wishes.boxes!r}",
            fix="name two tensors; where one output holds both, leave them out: --family list says which are known",
        )
    if wishes.boxes and wishes.logits and not wishes.family:
        reading = Reading("named tensors", editor.value(wishes.boxes), editor.value(wishes.logits), boxes_are="")
        reading.fact("heads", f"{wishes.boxes}, {wishes.logits}", "--boxes, --logits")
    else:
        reading = recognise(editor, front, len(labels), wishes.family)
        if wishes.boxes:
            reading.boxes = editor.value(wishes.boxes)
        if wishes.logits:
            reading.scores = editor.value(wishes.logits)
    where = front.cut or f"input {front.pixels.name!r}"
    layout = "[B,H,W,3], channels last" if front.channels_last else "[B,3,H,W]"
    reading.fact(
        "input", f"{front.width} x {front.height}, {layout}, {front.dtype}", f"behind {where}" if front.cut else where
    )
    for name in ("boxes_are", "box_order", "scores_are"):
        if value := getattr(wishes, name):
            setattr(reading, name, value)
            reading.stated.add(name)
            reading.fact(name.replace("_", " "), value, f"--{name.replace('_', '-')}")
    given = None
    if wishes.anchors:
        (array,) = editor.measure(front.example(), [reading.boxes])
        count = array.size // 4 if 4 in array.shape[-2:] else 0
        given = _anchors(wishes.anchors, front, wishes.box_order, count)
        reading.fact("anchors", anchor_forms.describe(given), f"--anchors {wishes.anchors}")
    adapted = adapt(editor, front, reading, len(labels), given)
    check_values(path, adapted, reading, front)
    for key, value in reading.picture.items():
        if not (front.normalised and key in ("mean", "std")):
            reading.suppose(f"input.{key}", value, f"input.{key}")
    if front.normalised:
        reading.fact("normalisation", "in the graph: plain pixel values go in", where)
    return Foreign(path, adapted, reading, front, model)


def load(path: Path) -> onnx.ModelProto:
    """The file.

    Raises:
        ImportModelError: it cannot be read, or is no ONNX model.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(path)
        if not model.HasField("graph"):  # also an empty file is a message of protobuf
            raise ValueError("it has no graph")
        return model
    except OSError as error:
        raise ImportModelError(f"{path}: cannot be read: {error.strerror or error}", fix="correct the path") from None
    except onnx.checker.ValidationError as error:  # external data
        raise ImportModelError(
            f"{path}: cannot be read whole: {error}",
            why="weights are in a file of their own beside it, which is missing or another one",
            fix="keep the files of the export together",
        ) from None
    except (DecodeError, ValueError) as error:
        with path.open("rb") as file:
            begin = file.read(len(_LFS_POINTER))
        why, fix = "the file is truncated or of another kind", "export it again"
        if begin == _LFS_POINTER:
            why, fix = "it is a pointer of Git LFS, and the model itself was not downloaded", "run: git lfs pull"
        elif not begin:
            why = "the file is empty"
        raise ImportModelError(f"{path}: no ONNX model: {error}", why=why, fix=fix) from None


def _anchors(text: str, front: Front, order: str, count: int) -> NDArray[np.float32]:
    """The user's anchors as cx,cy,w,h in 0..1.

    Raises:
        OptionError: they cannot be had, or their order cannot be told.
    """
    import numpy as np

    rows = anchor_forms.from_text(text, front.width, front.height, count)
    form, unit = documented = ("cxcywh", "fraction")
    if Path(text).suffix not in anchor_forms.SUFFIXES:
        return rows  # a generator's
    forms = anchor_forms.plausible_forms(rows, front.width, front.height)
    if order and (not forms or any(form[0] == order for form in forms)):
        unit = "pixel" if np.abs(rows).max() > IN_PIXELS else "fraction"
    else:
        order = ""  # it is that of the boxes: the anchors tell another one
        corners = [other for other in forms if other[0] in ("xyxy", "yxyx") and other[1] == "fraction"]
        if documented not in forms or corners:
            form, unit = anchor_forms.guess_form(rows, front.width, front.height)
    size = (front.width, front.height) if unit == "pixel" else (1, 1)
    return anchor_forms.corners_to_centers(rows, order or form, *size)


def write(folder: Path, foreign: Foreign) -> dict[str, dict[str, Any]]:
    """Writes model.onnx and, where there are any, anchors.npy; gives the tables of spec.toml."""
    import numpy as np
    import onnx

    onnx.save(foreign.adapted.model, folder / "model.onnx")
    if foreign.adapted.anchors is not None:
        np.save(folder / "anchors.npy", foreign.adapted.anchors)
    return {"model": {}, "input": dict(foreign.adapted.picture), "nms": dict(foreign.adapted.nms)}


def _check_fixed_batch(editor: Editor, front: Front) -> None:
    """Refuses a batch of several pictures that is written into the graph.

    Raises:
        ImportModelError: it is; names the first node that holds it.
    """
    shape = list(front.picture.shape or ())
    batch = shape[0] if shape and isinstance(shape[0], int) else 1
    if batch == 1:
        return
    for node in editor.nodes("Reshape", "Expand", "Tile"):
        value = editor.constant(node.inputs[1])
        if value is not None and value.ndim == 1 and len(value) > 1 and value[0] == batch:
            raise ImportModelError(
                f"{editor.path}: is exported for batches of {batch}: its node {node.name or node.outputs[0].name!r} "
                f"({node.op_type}) holds that number",
                why=f"its input {front.picture.name!r} is {shape}",
                fix="export it with an open batch (torch.onnx.export: dynamic_axes={'input': {0: 'batch'}, ...}), or "
                "with a batch of 1",
            )
