"""What was brought back from a GPU: the table in plugins/README.md is of the raw figures."""

from __future__ import annotations

import json

from build.files import ROOT

FOLDER = ROOT / "perf" / "results" / "gpu" / "nvidia-h100-80gb-hbm3-no-tensorrt"


def test_the_table_of_the_h100_is_of_its_raw_figures() -> None:
    told = {}
    for row in json.loads((FOLDER / "kernels.json").read_text())["measure"]["rows"]:
        theirs = row.get("us, torchvision")
        peer = f"{theirs:,.0f} ({theirs / row['us']:,.0f} ×)" if theirs else "–"
        key = [row["model"], row["type"], str(row["threshold"]), row["inputs"], str(row["batch"])]
        times = [f"{row[name]:.1f}" for name in ("us", "us, one call alone", "times the floor")]
        told[tuple(key)] = [f"{row['candidates per image']:.0f}", *times, peer]
    section = (ROOT / "plugins" / "README.md").read_text().split("### Measured on an H100")[1].split("###")[0]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| SSD")]
    assert len(lines) > 10
    for line in lines:
        assert line[5:] == told[tuple(line[:5])]


def test_the_sanitizers_found_nothing_and_every_bit_was_equal() -> None:
    for told in json.loads((FOLDER / "sanitizers.json").read_text())["tools"].values():
        assert (told["exit"], told["differences"]) == (0, 0)
        assert " 0 " in told["summary"]
        assert sum(told["compared"].values()) == 24
