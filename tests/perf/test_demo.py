"""What the demo does with detectors that were imported."""

import io
import re
from pathlib import Path

from PIL import ImageChops
from rich.console import Console

from build.files import IMPORT_FILE
from build.gate.datasets import photographs
from build.serve import TritonServer
from perf import demo


def test_an_imported_detector_that_cannot_be_published_is_said_and_left_out(tmp_path: Path) -> None:
    (tmp_path / "models" / "broken").mkdir(parents=True)
    (tmp_path / "models" / "broken" / IMPORT_FILE).write_text("{}")
    (tmp_path / "models" / "own").mkdir()  # not imported: not the demo's
    output = io.StringIO()
    console = Console(file=output, soft_wrap=True)

    assert demo._build_imported(tmp_path / "repository", console, tmp_path / "models") == []

    assert re.search(r"goes on without broken: .*spec\.toml", output.getvalue())
    assert "own" not in output.getvalue()


def test_a_photograph_shows_what_the_served_detector_sees(triton_server: TritonServer) -> None:
    picture, seen = demo.photograph(triton_server.grpc_url, "shapes")

    original = photographs()[0]
    assert picture.size == original.size
    drawn = ImageChops.difference(picture.convert("RGB"), original).getbbox() is not None
    assert drawn == (seen != "nothing")
    assert seen == "nothing" or re.fullmatch(r"\d+ \w+(, \d+ \w+)*", seen)
