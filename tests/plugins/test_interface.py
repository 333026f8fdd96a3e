"""The C interface: what is refused, with which words, and what the workspace costs. Needs no GPU."""

from __future__ import annotations

import ctypes
import re
import shutil
import threading
from typing import Any

import numpy as np
import pytest

from build.contract import Nms
from tests.plugins.library import STATUS, Library, Params, Shape, Tensors, aligned, params_of

SSD300 = {"batch": 1, "anchors": 8732, "classes": 81}


def shape(**changes: int) -> Shape:
    return Shape(**{**SSD300, "logits_type": 1, "deltas_type": 1, **changes})


def params(**changes: Any) -> Params:
    got = params_of(Nms())
    for name, value in changes.items():
        setattr(got, name, value)
    return got


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score_threshold": 1.5}, "score_threshold is 1.5, must be in [0, 1]"),
        ({"score_threshold": float("nan")}, "score_threshold is nan, must be in [0, 1]"),
        ({"iou_threshold": -0.25}, "iou_threshold is -0.25, must be in [0, 1]"),
        ({"max_detections": 0}, "max_detections is 0, must be at least 1"),
        ({"topk_per_class": -1}, "topk_per_class is -1, must be at least 0 (0: no cap)"),
        ({"background_class": -2}, "background_class is -2, must be -1 (none) or a class"),
        ({"background_class": 81}, "background_class is 81, must be below the number of classes, 81"),
        ({"score_activation": 3}, "score_activation is 3, must be 0 (softmax), 1 (sigmoid) or 2 (none)"),
        ({"box_coding": -1}, "box_coding is -1, must be 0 (center_size) or 1 (corner)"),
        ({"clip_boxes": 2}, "clip_boxes is 2, must be 0 or 1"),
        ({"class_agnostic": -1}, "class_agnostic is -1, must be 0 or 1"),
        ({"lowest_score_threshold": -0.5}, "lowest_score_threshold is -0.5, must be in [0, 1]"),
        ({"box_scales": (ctypes.c_float * 4)(10, 0, 5, 5)}, "box_scales[1] is 0, must be above 0 and finite"),
        (
            {"box_scales": (ctypes.c_float * 4)(1, 1, 1, float("inf"))},
            "box_scales[3] is inf, must be above 0 and finite",
        ),
    ],
)
def test_parameters_out_of_range_are_named_Negative(reference: Library, changes: dict[str, Any], message: str) -> None:  # noqa: N802
    assert reference.validate(params(**changes), shape()) == ("params", message)


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({"batch": 0}, "shape", "the batch is 0, must be at least 1"),
        ({"anchors": -1}, "shape", "there are -1 anchors, must be at least 1"),
        ({"classes": 0}, "shape", "there are 0 classes, must be at least 1"),
        ({"classes": 1}, "shape", "there is 1 class and it is the background: nothing could be detected"),
        ({"deltas_type": 2}, "shape", "the type of box_deltas is 2, must be 0 (FP32) or 1 (FP16)"),
        ({"logits_type": -1}, "shape", "the type of class_logits is -1, must be 0 (FP32) or 1 (FP16)"),
        (
            {"anchors": 2**24, "classes": 300},
            "too large",
            "16777216 anchors x 299 foreground classes = 5016387584 candidates per image, must be at most 4294967295",
        ),
        ({"batch": 245932}, "too large", "batch 245932 x 8732 anchors = 2147478224, must be at most 2147483647"),
    ],
)
def test_shapes_out_of_range_are_named_Negative(  # noqa: N802
    reference: Library, changes: dict[str, int], status: str, message: str
) -> None:
    if changes == {"batch": 245932}:  # just fits; one more does not
        assert reference.validate(params(), shape(**changes)) == ("ok", "")
        changes, message = {"batch": 245933}, "batch 245933 x 8732 anchors = 2147486956, must be at most 2147483647"
    assert reference.validate(params(), shape(**changes)) == (status, message)


def test_null_and_short_messages_do_no_harm_Negative(reference: Library) -> None:  # noqa: N802
    assert reference.validate(None, shape()) == ("pointer", "params must not be null")
    assert reference.validate(params(), None) == ("ok", "")  # the parameters alone
    assert reference.validate(params(max_detections=-5), None)[0] == "params"
    short = ctypes.create_string_buffer(8)
    bad, good = params(max_detections=-5), shape()
    assert reference.c.ssdNmsValidate(ctypes.addressof(bad), ctypes.addressof(good), short, 8) == STATUS.index("params")
    assert short.value == b"max_det"
    assert reference.c.ssdNmsValidate(ctypes.addressof(bad), ctypes.addressof(good), None, 0) == STATUS.index("params")


def test_every_status_has_its_words(reference: Library) -> None:
    texts = {reference.c.ssdNmsStatusString(status) for status in range(len(STATUS))}
    assert len(texts) == len(STATUS)
    assert reference.c.ssdNmsStatusString(99) == b"unknown status"


@pytest.mark.parametrize("which", ["emulated", "reference"])
def test_bad_pointers_are_refused_Negative(request: pytest.FixtureRequest, which: str) -> None:  # noqa: N802
    library: Library = request.getfixturevalue(which)
    small = Shape(1, 4, 3, 0, 0, 0, 0)
    names = [name for name, _ in Tensors._fields_ if not name.endswith("thresholds")]
    memory = {name: aligned(1 << 14) for name in names}
    workspace = aligned(1 << 14)

    def launch(size: int = 1 << 14, at: int = workspace.ctypes.data, dims: Shape = small, **changes: int | None) -> str:
        pointers = {name: array.ctypes.data for name, array in memory.items()}
        return library.launch(params(), dims, Tensors(**{**pointers, **changes}), at, size)

    for name in ("box_deltas", "class_logits", "anchors"):
        memory[name][:] = 0
    assert launch() == "ok"
    for name in names:
        assert launch(**{name: None}) == "pointer", name
        assert launch(**{name: memory[name].ctypes.data + 4}) == "pointer", name
    assert launch(dims=Shape(1, 4, 3, 0, 0, 1, 0)) == "pointer"  # a threshold input that is not given
    assert launch(dims=Shape(1, 4, 3, 0, 0, 0, 1)) == "pointer"
    assert launch(dims=Shape(1, 4, 1, 0, 0, 0, 0)) == "shape"
    if which == "emulated":
        need = library.workspace_size(params(), small)
        assert launch(size=need) == "ok"
        assert launch(size=need - 1) == "workspace"
        assert launch(at=0) == "pointer"
        assert launch(at=workspace.ctypes.data + 8) == "pointer"


def small_call(library: Library) -> str:
    """Launches four anchors of three classes, on the host's memory."""
    memory = [aligned(1 << 14, fill=0) for _ in range(len(Tensors._fields_) + 1)]
    *tensors, workspace = (array.ctypes.data for array in memory)
    return library.launch(params(), Shape(1, 4, 3, 0, 0, 0, 0), Tensors(*tensors), workspace, 1 << 14)


def test_the_cuda_error_of_a_failed_launch_is_kept_and_worded(emulated: Library) -> None:
    try:
        emulated.c.emulatorRefuse(209, 0)
        assert small_call(emulated) == "launch"
        assert emulated.c.ssdNmsLastError().decode() == (
            "findCandidates: no kernel image is available for execution on the device (cudaErrorNoKernelImageForDevice)"
            "; the device is GPU 3, Emulated GPU, of compute capability 8.7, the library has code for 75-real"
        )
        emulated.c.emulatorRefuse(719, 1)  # the first launch passes
        assert small_call(emulated) == "launch"
        assert emulated.c.ssdNmsLastError() == b"selectDetections: another error (cudaErrorOther)"
        texts = []  # each thread has its own
        thread = threading.Thread(target=lambda: texts.append(emulated.c.ssdNmsLastError()))
        thread.start()
        thread.join()
        assert texts == [b""]
    finally:
        emulated.c.emulatorRefuse(0, 0)


def test_the_cuda_core_says_what_cuda_said(core: Library) -> None:
    if shutil.which("nvidia-smi"):
        pytest.skip("there is a GPU, which takes no memory of the host: needs a machine without one")
    assert core.c.ssdNmsLastError() == b""
    assert small_call(core) == "launch"
    assert re.fullmatch(r"findCandidates: .+ \(cudaError\w+\)", core.c.ssdNmsLastError().decode())


def test_the_workspace_grows_with_what_can_pass(emulated: Library) -> None:
    def size(changes: dict[str, int] | None = None, **settings: Any) -> int:
        return emulated.workspace_size(params(**settings), shape(**(changes or {})))

    tiles, anchors = 137, 137 * 64  # 8,732 anchors in tiles of 64
    counts = (tiles * 4 + 15) // 16 * 16
    key = 2 * 8  # a key, and room to sort it
    assert size() == anchors * 20 * key + counts  # at most 20 classes of an anchor can be above 0.05
    assert size(score_threshold=0.5) == anchors * 2 * key + counts
    assert size(score_threshold=0.0, lowest_score_threshold=0.0) == anchors * 80 * key + counts
    assert size(score_activation=1) == anchors * 80 * key + counts
    for asked in ({"score_threshold": 0.0}, {"score_threshold": 0.5}):
        given = size({"has_score_thresholds": 1}, **asked, lowest_score_threshold=0.1)
        assert given == anchors * 10 * key + counts  # whatever a request may ask for
    assert size(score_threshold=0.0, lowest_score_threshold=0.1) == anchors * 10 * key + counts
    assert size(topk_per_class=400) == size() + 80 * 4
    assert size({"batch": 64}) >= 64 * anchors * 20 * key
    assert size(max_detections=0) == 0
    for less in ({"batch": 63}, {"anchors": 8731}, {"anchors": 1}):
        assert size({"batch": 64, **less}) <= size({"batch": 64})


def test_the_cuda_core_answers_as_the_emulated_one(core: Library, emulated: Library) -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        settings = params(
            score_threshold=float(random.choice([0, 0.01, 0.3, 1])),
            topk_per_class=int(random.choice([0, 100])),
            score_activation=int(random.integers(3)),
        )
        dims = Shape(*map(int, random.integers(2, 3000, 3)), *map(int, random.integers(0, 2, 4)))
        assert core.workspace_size(settings, dims) == emulated.workspace_size(settings, dims) > 0
    assert core.validate(params(max_detections=0), shape())[0] == "params"
    nothing = Tensors()
    assert core.launch(params(), shape(), nothing, 0, 0) == "pointer"  # before anything touches a device
