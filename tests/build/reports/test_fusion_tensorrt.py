"""Every layer of a plan mapped back to its source nodes, or said to be unmapped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from build.reports import fusion_html, fusion_text
from build.reports.fusion_tensorrt import tensorrt_report
from build.reports.roofline import FusionError
from tests.build.reports.networks import CEILINGS, FIXTURES, detector, mapped


@pytest.mark.parametrize("version", ["10", "11"])
def test_both_schemas_of_the_engine_inspector(version: str) -> None:
    report = tensorrt_report(
        "tiny",
        detector(),
        "fp16",
        FIXTURES / f"written_after_schema_tensorrt_{version}.json",
        FIXTURES / "written_after_schema_profile.json",
        CEILINGS,
    )
    kernels = {kernel.name: kernel for kernel in report.kernels}
    groups = mapped(report)
    assert groups["c1 + bn1 + r1"] == {"c1", "bn1", "r1"}
    assert groups["c2 + add + r2"] == {"c2", "add", "r2"}
    assert groups["box || cls"] == {"box", "cls"}
    assert kernels["box || cls"].kind == "horizontal"
    assert kernels["c1 + bn1 + r1"].kind == "vertical"
    assert kernels["c1 + bn1 + r1"].precision == "FP16"
    assert kernels["__myl_TraResTraRes_myl0_0"].precision == "FP32"
    assert kernels["c1 + bn1 + r1"].milliseconds == 0.012
    assert [kernel.kind for kernel in report.kernels].count("added") == 1
    assert {item.name: item.fate for item in report.nodes if item.op == "Concat"} == {
        "box_cat": "eliminated",
        "cls_cat": "eliminated",
    }
    assert [item.name for item in report.fates()["dead"]] == ["unused"]
    assert not report.not_merged
    assert not [kernel for kernel in report.kernels if kernel.evidence == "unmapped"]
    assert report.milliseconds == pytest.approx(0.087)
    assert "Concat elimination: 2 of 2" in fusion_text.markdown(report)
    assert "<svg" in fusion_html.html(report)


def test_a_layer_of_which_nothing_is_known_is_unmapped(tmp_path: Path) -> None:
    data = json.loads((FIXTURES / "written_after_schema_tensorrt_10.json").read_text())
    data["Layers"][2] |= {"Name": "{ForeignNode[c2...r2]}", "Metadata": ""}
    (tmp_path / "layers.json").write_text(json.dumps(data))
    report = tensorrt_report("tiny", detector(), "fp16", tmp_path / "layers.json", None, None)
    assert report.kernels[2].evidence == "unmapped"
    assert {item.name for item in report.fates()["unmapped"]} >= {"c2", "add", "r2"}
    assert all(item.fate != "eliminated" for item in report.nodes)  # they may be in that layer
    assert all(kernel.milliseconds is None and not kernel.bound for kernel in report.kernels)


def test_layers_without_metadata_are_known_by_their_names(tmp_path: Path) -> None:
    data = json.loads((FIXTURES / "written_after_schema_tensorrt_10.json").read_text())
    for layer in data["Layers"]:
        layer["Metadata"] = ""
    data["Layers"][4]["Name"] = "PWN(box_t, box_r)"
    (tmp_path / "layers.json").write_text(json.dumps(data))
    report = tensorrt_report("tiny", detector(), "fp16", tmp_path / "layers.json", None, None)
    groups = mapped(report)
    assert groups["c1 + bn1 + r1"] == {"c1", "bn1", "r1"}
    assert groups["PWN(box_t, box_r)"] == {"box_t", "box_r"}
    assert groups["box || cls"] == set()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"Layers": ["a", "b"], "Bindings": []}', "names alone"),
        ('{"nodes": []}', "has no Layers"),
        ('{"Layers": [', "no valid JSON"),
        ("[1, 2]", "no JSON object"),
    ],
)
def test_wrong_layer_information_is_explained(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "layers.json").write_text(text)
    with pytest.raises(FusionError, match=message):
        tensorrt_report("tiny", detector(), "fp16", tmp_path / "layers.json", None, None)
