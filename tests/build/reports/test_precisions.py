"""The table of what networks lose and gain by precision, on a little model, and where it is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from build import spec as specs
from build.errors import DataError
from build.quantization import qdq
from build.reports import precisions
from tests.build import pictures, tiny_model


def test_every_precision_is_judged_and_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qdq, "_FP8_TOO_FEW", 0)  # as if TensorRT had FP8 kernels for so few channels
    path = tiny_model.write(tmp_path / "tiny")
    pictures.write(tmp_path / "tiny" / "calibration", 100, tiny_model.LABELS, seed=1)
    pictures.write(tmp_path / "tiny" / "held_out", 12, tiny_model.LABELS, seed=2)
    data = 'calibration = "calibration"\nheld_out = "held_out"\nlabels_from = "fp32"'
    path.write_text(f"{path.read_text()}\n[data]\n{data}\n\n[quantization]\ngate = 0.999\n")
    before = path.read_bytes()
    document = tmp_path / "page.md"
    document.write_text("above\n")
    spec = specs.load(path)
    with pytest.raises(DataError, match="has no place for the table"):
        precisions.measure([spec], tmp_path, document=document)
    document.write_text("above\n\n<!-- table: ./invoke audit --table -->\nold\n<!-- end of table -->\n\nbelow\n")
    rows = precisions.measure([spec], tmp_path, rounds=2, document=document, console=Console(quiet=True))

    kinds = [(row["precision"], row["calibrator"]) for row in rows]
    assert kinds[:3] == [("fp32", ""), ("fp16", ""), ("bf16", "")]
    assert [kind for kind, _ in kinds].count("fp8") == 4
    int8 = [row for row in rows if row["precision"] == "int8"]
    assert len(int8) == 4, "the three calibrators, and what the search for layers to leave out came to"
    for row in int8:
        assert set(row["forms"]) == {"as written", "onnxruntime"}
        assert row["share"] == pytest.approx(min(row["forms"].values()))
        assert row["as_written_speed"] > 0
        assert row["onnxruntime_speed"] > 0
    noise = {kind: row["noise_db"] for (kind, _), row in zip(kinds[1:], rows[1:], strict=True)}
    assert noise["fp16"] > noise["bf16"] > noise["int8"] > 10
    assert noise["fp8"] < noise["int8"]
    assert {row["convolutions"] for row in rows} == {len(qdq.convs(tiny_model.source()))}
    assert json.loads((tmp_path / "audit" / "table.json").read_text())["rows"] == rows
    text = precisions.markdown(rows)
    assert (tmp_path / "audit" / "table.md").read_text() == text
    written = document.read_text()
    assert written.startswith("above\n\n<!-- table: ./invoke audit --table -->\n| network | precision")
    assert written.endswith("<!-- end of table -->\n\nbelow\n")
    assert text in written
    assert "old" not in written
    assert path.read_bytes() == before
