"""Runs the README's code blocks as they stand, against a real server; one that cannot run here says so above itself."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from build.serve import TritonServer
from models.shapes.scenes import scene

ROOT = Path(__file__).parent.parent


class Block(NamedTuple):
    """A fenced block and the HTML comment right above it, if any."""

    language: str
    text: str
    note: str


def _blocks() -> list[Block]:
    pattern = re.compile(r"(?:^<!-- (?P<note>.*?) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.M | re.S)
    return [
        Block(m["language"], m["text"], m["note"] or "") for m in pattern.finditer((ROOT / "README.md").read_text())
    ]


def test_only_these_blocks_do_not_run() -> None:
    assert [block.text.splitlines()[0].split()[:2] for block in _blocks() if block.note] == [
        ["./invoke", "test"],
        ["./invoke", "serve"],
        ["./invoke", "import-model"],
        ["./invoke", "import-model"],
        ["docker", "run"],
    ]


@pytest.mark.triton
@pytest.mark.slow
@pytest.mark.parametrize(
    "block", [b for b in _blocks() if not b.note], ids=lambda block: block.text.splitlines()[0][:40]
)
def test_block_runs(block: Block, triton_server: TritonServer, tmp_path: Path) -> None:
    scene("held_out", 0).image.save(tmp_path / "picture.jpg", quality=95)
    started = time.time()
    text = block.text.replace("localhost:8001", triton_server.grpc_url)
    if block.language == "python":
        command, folder = [sys.executable, "-c", text], tmp_path
    else:
        command, folder = (
            [
                "sh",
                "-euc",
                text.replace("picture.jpg", str(tmp_path / "picture.jpg")).replace(
                    "detected", str(tmp_path / "detected")
                ),
            ],
            ROOT,
        )
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    if block.text == "./invoke demo\n":
        for name in ("detections.png", "summary.json"):
            assert (ROOT / "artifacts" / "demo" / name).stat().st_mtime > started
    if block.language == "python":
        assert (tmp_path / "picture-detections.png").stat().st_size > 0
        assert done.stdout.strip(), "no detection in a scene that has objects"
