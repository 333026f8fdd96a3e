"""TensorRT's part of a fusion report: a plan's layers and their times as JSON, mapped back to the source's nodes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build import files
from build.errors import SSDError
from build.publish import repository
from build.reports.fusion_analysis import finish
from build.reports.fusion_model import Kernel, Report
from build.reports.roofline import Ceilings, FusionError, read_json
from build.reports.source_graph import Source

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

_MARKER = re.compile(r"\[ONNX Layer: ([^\x1e\x1f]*?)\](?=[\x1e\x1f\[]|$)")

_TRT_TYPES = {"Float": "FP32", "Half": "FP16", "BFloat16": "BF16", "Int8": "INT8", "FP8": "FP8", "Int32": "INT32"}


def tensorrt_report(
    name: str,
    model: onnx.ModelProto,
    precision: str,
    layers: Path,
    profile: Path | None,
    ceilings: Ceilings | None,
    batch: int = 1,
) -> Report:
    """A report from recorded JSON files of TensorRT; needs neither a GPU nor TensorRT itself.

    Raises:
        FusionError: a file is not what it should be.
    """
    information = read_json(layers)
    if not isinstance(information, dict):
        raise FusionError(f"{layers}: is no JSON object with Layers", fix="give an engine inspector's JSON")
    rows = read_json(profile) if profile else []
    if not isinstance(rows, list):
        raise FusionError(f"{profile}: is no list of layer times", fix="export it with trtexec --exportProfile=...")
    source = Source(model, batch)
    kernels = map_layers(source, information, rows)
    schema = "11" if "I/O Tensors" in information else "8 to 10"
    report = Report(
        name,
        "tensorrt",
        f"schema of {schema}",
        precision,
        str(information.get("Device", "")) or "see the manifest of the plan",
        f"recorded in {layers.name}" + (f" and {profile.name}" if profile else ", without times"),
        kernels,
        ceilings,
    )
    times = [kernel.milliseconds for kernel in kernels if kernel.milliseconds is not None]
    report.milliseconds = sum(times) if times else None
    if profile and len(times) < len(kernels):
        report.notes.append(f"{len(kernels) - len(times)} layer(s) have no time in {profile.name}.")
    if ceilings is None:
        report.notes.append("No ceilings were given, so no kernel has a bound.")
    finish(report, source)
    return report


def map_layers(source: Source, information: Mapping[str, Any], profile: Sequence[Mapping[str, Any]]) -> list[Kernel]:
    """The layers of an engine inspector's JSON as kernels, with times from a profile in trtexec's format.

    Knows the schema of TensorRT 8 to 10 (`Bindings`, `Format/Datatype`) and that of 11 (`I/O Tensors`, `Format` and
    `DataType`). Nodes come from the metadata's `[ONNX Layer: ...]` markers, else from a layer name that is made of node
    names alone.

    Raises:
        FusionError: the JSON is not of an engine inspector, or has layer names alone.
    """
    layers = information.get("Layers")
    if not isinstance(layers, list) or not layers or not ({"Bindings", "I/O Tensors"} & set(information)):
        raise FusionError(
            "the layer information has no Layers with Bindings (TensorRT 8 to 10) or I/O Tensors (11)",
            why="the file is not an engine inspector's JSON",
            fix="export it with trtexec --exportLayerInfo=layers.json --profilingVerbosity=detailed",
        )
    if any(isinstance(layer, str) for layer in layers):
        raise FusionError(
            "the layer information has the layers' names alone",
            why="the plan was built without detailed profiling verbosity",
            fix="build it with profiling_verbosity DETAILED (trtexec --profilingVerbosity=detailed)",
        )
    times = {str(row["name"]): float(row.get("medianMs", row.get("averageMs", 0))) for row in profile if "name" in row}
    kernels = []
    for layer in layers:
        inputs, outputs = layer.get("Inputs", []), layer.get("Outputs", [])
        name = str(layer["Name"])
        kernel = Kernel(name, str(layer.get("LayerType", "")), _tensor_names(inputs), _tensor_names(outputs))
        kernel.tactic = str(layer.get("TacticName", ""))
        kernel.milliseconds = times.get(name)
        kernel.precision = _trt_precision(layer)
        markers = [m for m in _MARKER.findall(str(layer.get("Metadata", ""))) if m in source.by_name]
        parts = re.split(r" \+ |(?<=\))\s*,\s*|, ", re.sub(r"\b(?:PWN|fused)\(|\)$", "", name))
        if markers:
            kernel.nodes, kernel.evidence = sorted({source.by_name[m] for m in markers}), "metadata"
        elif kernel.op in ("Reformat", "NoOp") or name.startswith("Reformatting CopyNode"):
            kernel.evidence = "layout"
        elif all(part.strip(" )") in source.by_name for part in parts):
            kernel.nodes, kernel.evidence = sorted({source.by_name[part.strip(" )")] for part in parts}), "name"
        kernels.append(kernel)
    return kernels


def _tensor_names(tensors: Sequence[Any]) -> list[str]:
    return [str(tensor["Name"]) for tensor in tensors]


def _trt_precision(layer: Mapping[str, Any]) -> str:
    """The type of the weights where the layer has some, else of what it makes, else of what it reads."""
    weights = layer.get("Weights")
    if isinstance(weights, dict) and weights.get("Type") in _TRT_TYPES:
        return _TRT_TYPES[weights["Type"]]
    for tensor in [*layer.get("Outputs", []), *layer.get("Inputs", [])]:
        kind = str(tensor.get("DataType", ""))
        if kind in _TRT_TYPES:
            return _TRT_TYPES[kind]
        text = str(tensor.get("Format/Datatype", kind))
        named = re.search(r"\b(FP32|FP16|BF16|FP8|INT8|Int8|INT32|Int32)\b", text)
        if named:
            return named[1].upper()
        if text in _TRT_TYPES:
            return _TRT_TYPES[text]
    return ""


def record_layers(folder: Path, precision: str, feeds: Mapping[str, NDArray[Any]], layers: Path, runs: int) -> None:
    """Asks the published plan for its layers and their times, on the GPU that it was built for; keeps both as JSON.

    Where that cannot be done, what was recorded before is kept.

    Args:
        folder: the published version.
        precision: what it must have been built in.
        feeds: its inputs by name, of one picture.
        layers: where the layers are kept; their times go into profile.json beside it.
        runs: timed runs.

    Raises:
        FusionError: there is no plan of this precision, and nothing was recorded before.
        SSDError: the plan cannot be run here, and nothing was recorded before.
    """
    from build.tensorrt.plan import Plan
    from build.tensorrt.plugins import PLUGIN

    path = folder / "model.plan"
    try:
        if not path.is_file():
            raise FusionError(
                f"{layers} is not there, and no plan of {folder.parent.name} is published in {folder.parent.parent}",
                fix="build one on a machine with a GPU, or name a file of trtexec --exportLayerInfo with --layers",
            )
        manifest = json.loads((folder / repository.MANIFEST).read_bytes())
        if manifest.get("precision") != precision:
            raise FusionError(
                f"{path} is {manifest.get('precision')}, not {precision}",
                fix=f"publish that one: ./invoke build-engines --runtime tensorrt --precision {precision}",
            )
        with Plan(path, manifest.get("engine"), plugin=PLUGIN) as plan:
            information, times = plan.layers(), plan.layer_times(feeds, runs)
    except SSDError:
        if layers.is_file():
            return
        raise
    files.write_json(layers, information)
    files.write_json(layers.with_name("profile.json"), times)
