"""Runs the code blocks of docs/gateway.md and docs/clients.md against a real server and a real gateway."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from build.serve import TritonServer
from models.shapes.scenes import scene
from tests.docs_blocks import Block, blocks
from tests.gateway.conftest import Running, gateway
from tests.optional import optional

DOCS = Path(__file__).parent.parent / "docs"
PAGES = {name: blocks(DOCS / name) for name in ("gateway.md", "clients.md")}
OTHERS = ("from kserve", "from pytriton")  # of the group clients
pytestmark = pytest.mark.triton


@pytest.fixture(scope="module")
def running(triton_server: TritonServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with gateway(triton_server.grpc_url, tmp_path_factory.mktemp("docs")) as started:
        yield started


def test_only_these_blocks_do_not_run() -> None:
    assert {name: [b.text.split()[0] for b in page if b.note] for name, page in PAGES.items()} == {
        "gateway.md": ["pip", "size=$(wc"],
        "clients.md": [".venv/bin/python"] * 4,
    }


def to_run() -> Iterator[object]:
    for block in (block for page in PAGES.values() for block in page):
        if not block.note and block.text != "./invoke page\n":
            marks = [pytest.mark.long] if any(words in block.text for words in OTHERS) else []
            yield pytest.param(block, marks=marks, id=" ".join(block.text.split()[:6]))


@pytest.mark.parametrize("block", list(to_run()))
def test_block_runs(block: Block, triton_server: TritonServer, running: Running, tmp_path: Path) -> None:
    environment = dict(os.environ)
    if any(words in block.text for words in OTHERS):
        environment["PYTHONPATH"] = str(optional("clients"))
    scene("held_out", 0).image.save(tmp_path / "picture.jpg", quality=95)
    text = block.text.replace("localhost:8080", running.address)
    text = text.replace("localhost:8001", triton_server.grpc_url).replace("localhost:8000", triton_server.http_url)
    command = [sys.executable, "-c", text] if block.language == "python" else ["sh", "-euc", text]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout
    assert '"error"' not in said
    if block.language == "python":
        assert said.strip()
    elif "drawn.jpg" in block.text:
        assert json.loads(said)["detections"]
        assert Image.open(tmp_path / "drawn.jpg").size == (300, 300)
    else:
        assert '"num_detections"' in said or '"outputs"' in said
