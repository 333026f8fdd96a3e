"""README's and docs' figures are those of the JSON that they came from."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from build.errors import DataError
from perf import figures
from tests.perf import example_run


@pytest.mark.parametrize("path", figures.DOCUMENTS, ids=lambda path: path.name)
def test_documents_show_what_the_json_holds(path: Path) -> None:
    kept, text = json.loads(figures.RESULTS.read_text()), path.read_text()
    blocks = re.findall(r"<!-- figures: ([\w-]+) -->", text)
    assert blocks
    assert set(blocks) <= set(figures.BLOCKS)
    assert text == figures.written(text, kept), "write them anew: ./invoke perf --publish-figures"
    assert text.count("<!-- figures: ") == text.count("<!-- end of figures -->") == len(blocks)


def test_a_changed_figure_is_noticed() -> None:
    path = figures.DOCUMENTS[0]
    kept, text = json.loads(figures.RESULTS.read_text()), path.read_text()
    kept["served"]["precisions"]["fp32"]["served_ratio"]["shm"] -= 0.001
    assert text != figures.written(text, kept)


def test_publishing(tmp_path: Path) -> None:
    document, results = tmp_path / "page.md", tmp_path / "cpu.json"
    end = "<!-- end of figures -->\n"
    document.write_text(f"a\n<!-- figures: loadgen -->\nold\n{end}b\n<!-- figures: demo -->\nold\n{end}")
    with pytest.raises(DataError, match="no complete run"):
        figures.publish(tmp_path, results, [document])
    for name, change in (
        ("2026-01-01", {}),
        ("2026-01-02", {"mlperf": {}}),
        ("2026-01-03", {"complete": False}),
        ("2026-01-04", {}),
        ("2026-01-05", {"environment": None}),
    ):
        folder = tmp_path / "mlperf" / name
        folder.mkdir(parents=True)
        summary = {**example_run.summary(), "run": name}
        if name == "2026-01-02":
            summary["mlperf"] = {"fp32": {"offline": summary["mlperf"]["fp32"]["offline"]}}
            change = {}
        if name == "2026-01-04":  # LoadGen calls one of its runs INVALID
            summary["mlperf"]["int8"]["server"]["valid"] = False
        whole = {**summary, **change}
        if whole["environment"] is None:  # an older version's
            del whole["environment"]
        (folder / "summary.json").write_text(json.dumps(whole))
    taken = figures.publish(tmp_path, results, [document])
    assert ["2026-01-02" in sentence for sentence in taken] == [True]
    text = document.read_text()
    assert text.startswith("a\n<!-- figures: loadgen -->\n| precision | scenario |")
    assert "| fp32 | offline | VALID | throughput, samples/s | 198 |" in text
    assert "single-stream" not in text
    assert "2 cores, no GPU, python 3.11.7, tritonserver 2.51.0" in text
    assert "commit f5d07c7, 2026-01-02, load average 0.12 when it began.)\n<!-- end of figures -->\nb\n" in text
    assert text.endswith("<!-- figures: demo -->\n<!-- end of figures -->\n")  # no figures, no table
    assert figures.written(text, json.loads(results.read_text())) == text
