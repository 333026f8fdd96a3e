"""What build/contract.py states is stated nowhere else: documents, task help and the backends are held against it."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ssd_client import config as client_config

from build import contract
from build.contract import Nms, Target
from build.errors import OptionError
from build.files import ROOT
from build.tables import in_words

DESIGN = (ROOT / "docs" / "design.md").read_text()


def table(text: str, heading: str) -> list[list[str]]:
    """The rows of the first Markdown table behind a heading, as cells."""
    lines = iter(text.split(heading, 1)[1].splitlines())
    rows = []
    for line in lines:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        elif rows:
            break
    return rows[2:]


# -- tensors -----------------------------------------------------------------------------------------------------------


def test_the_design_lists_the_served_tensors() -> None:
    rows = [(name, shape) for name, shape, _ in table(DESIGN, "## The served model")]
    height, width, most = 301, 299, 77
    symbols = {height: "H", width: "W", most: "K"}

    def row(way: str, tensor: contract.Tensor) -> tuple[str, str]:
        sizes = ",".join(["B", *(symbols.get(size, str(size)) for size in tensor.shape)])
        return f"{way} `{tensor.name}`", f"{tensor.triton} [{sizes}]"

    inputs, outputs = contract.inputs(height, width, True), contract.outputs(most)
    assert rows == [*(row("in", tensor) for tensor in inputs), *(row("out", tensor) for tensor in outputs)]


def test_the_client_knows_the_same_contract() -> None:
    assert client_config.CONTRACT == contract.VERSION
    stated = {name.strip(" `") for cells in table(DESIGN, "`config.pbtxt` carries") for name in cells[0].split(",")}
    read = set(re.findall(r'read\("(\w+)"', Path(client_config.__file__).read_text()))
    assert read == stated - {
        "threads",
        "runners",
        "engine",
        "engine_precision",
        "model_sha256",
    }  # for the backend, not for clients


@pytest.mark.parametrize("file", ["python/model.py", "ssd_onnxruntime/instance.cpp"])
def test_the_backends_name_only_these_tensors(file: str) -> None:
    source = (ROOT / "build" / "publish" / "backends" / file).read_text()
    known = {*contract.THRESHOLDS, *contract.OUTPUTS, contract.IMAGES}
    named = set(re.findall(r'"((?:num|detection|score|iou)_\w+|images)"', source))
    assert set(contract.THRESHOLDS) <= named <= known


def test_thresholds_go_where_the_model_takes_them() -> None:
    images = np.zeros((3, 2, 2, 3), np.uint8)
    assert set(Nms().feeds(images)) == {"images"}
    nms = Nms(score_threshold=0.2, iou_threshold=0.6, runtime_thresholds=True)
    feeds = nms.feeds(images)
    assert feeds["images"] is images
    for name, value in (("score_threshold", 0.2), ("iou_threshold", 0.6)):
        assert feeds[name].dtype == np.float32
        assert feeds[name].tolist() == [[np.float32(value)]] * 3
    assert nms.feeds(images, 0.5)["score_threshold"].tolist() == [[0.5]] * 3
    each = nms.feeds(images, np.array([0.25, 0.5, 0.75]))["score_threshold"]
    assert each.tolist() == [[0.25], [0.5], [0.75]]
    each[0] = 1  # an array of its own, not a view of what was given


# -- SSDNMS ------------------------------------------------------------------------------------------------------------


def test_the_design_lists_the_attributes() -> None:
    fields = {item.name: item for item in dataclasses.fields(Nms)}
    rows = table(DESIGN, "and TensorRT's parser then resolves the node")
    assert [cells[0].split()[0].strip("`") for cells in rows] == list(contract.ATTRIBUTES)
    types = {float: "float", int: "int", bool: "int", str: "string", tuple: "4 floats"}
    for (_, kind, default, allowed), name in zip(rows, contract.ATTRIBUTES, strict=True):
        item, rule = fields[name], fields[name].metadata
        assert kind == types[type(item.default)], name
        written = Nms().attributes()[name]
        plain = ",".join(f"{value:g}" for value in written) if isinstance(written, tuple) else written
        assert default == (f"{plain:g}" if isinstance(plain, (int, float)) else plain), name
        if rule["choices"]:
            assert allowed == ", ".join(rule["choices"])
        elif isinstance(item.default, bool):
            assert allowed == "0, 1"
        elif isinstance(item.default, float):
            assert allowed == f"[{rule['low']:g}, {rule['high']:g}]"
        elif rule["above"] == 0:
            assert allowed == "> 0"
        else:
            assert allowed.startswith((f"≥ {rule['low']:g}", f"{rule['low']:g} ")), name


def test_ranges_are_in_words() -> None:
    rules = {item.name: item.metadata for item in dataclasses.fields(Nms)}
    assert in_words(rules["score_threshold"]) == "in 0..1"
    assert in_words(rules["box_scales"]) == "greater than 0"


# -- precisions --------------------------------------------------------------------------------------------------------


def test_targets() -> None:
    assert [str(Target("tensorrt", name)) for name in contract.precisions_of("tensorrt")] == [
        "fp32, tensorrt", "tf32, tensorrt", "fp16, tensorrt", "bf16, tensorrt", "int8, tensorrt", "fp8, tensorrt",
    ]  # fmt: skip
    implicit = Target("tensorrt", "int8", "implicit")
    assert (implicit.implicit, implicit.typed, implicit.kind.typed) == (True, False, True)
    assert str(implicit) == "int8, tensorrt, implicit calibration"
    assert Target.of({"runtime": "tensorrt", "precision": "int8", "calibration": {"way": "implicit"}}) == implicit
    assert Target.of({"runtime": "onnxruntime", "precision": "fp32"}) == Target("onnxruntime")
    with pytest.raises(dataclasses.FrozenInstanceError):
        implicit.precision = "fp32"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("target", "complaint"),
    [
        (("cuda",), "runtime is 'cuda', but must be one of onnxruntime, tensorrt"),
        (("onnxruntime", "fp8"), r"the runtime onnxruntime has fp32, fp16, bf16, int8 only\n.*add --runtime tensorrt"),
        (("tensorrt", "int4"), "the runtime tensorrt has fp32, tf32, fp16, bf16, int8, fp8 only"),
        (("tensorrt", "int8", "both"), "calibration is 'both', but must be one of explicit, implicit"),
        (("onnxruntime", "int8", "implicit"), r"this would build int8 for onnxruntime\n[\s\S]*--runtime tensorrt"),
        (("tensorrt", "fp8", "implicit"), "this would build fp8 for tensorrt"),
    ],
)
def test_what_is_no_target(target: tuple[Any, ...], complaint: str) -> None:
    with pytest.raises(OptionError, match=complaint):
        Target(*target)


def test_the_task_help_names_what_there_is() -> None:
    """The help of --runtime, --precision and --calibration of every task that takes them."""
    helps: dict[str, str] = {}
    for node in ast.walk(ast.parse((ROOT / "tasks" / "building.py").read_text())):
        if isinstance(node, ast.FunctionDef) and node.name == "build_engines":
            keywords = [k for d in node.decorator_list if isinstance(d, ast.Call) for k in d.keywords]
            helps = ast.literal_eval(next(k.value for k in keywords if k.arg == "help"))
    assert all(runtime in helps["runtime"] for runtime in contract.RUNTIMES)
    everywhere, only = helps["precision"].split("; for tensorrt also ")
    assert re.findall(r"\w+\d+", everywhere) == list(contract.precisions_of("onnxruntime"))
    extra = [name for name in contract.PRECISIONS if name not in contract.precisions_of("onnxruntime")]
    assert re.findall(r"\w+\d+", only) == extra
    assert all(calibration in helps["calibration"] for calibration in contract.CALIBRATIONS)


def test_the_page_on_precision_lists_them() -> None:
    page = (ROOT / "docs" / "precision.md").read_text()
    named = [cells[0].split()[0] for cells in table(page, "## What there is")]
    assert named == list(contract.PRECISIONS)
