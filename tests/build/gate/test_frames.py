"""Frames of a video: how many, how far apart, and two sets that share none."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from build.errors import DataError, RuntimeUnavailableError
from build.gate import datasets, frames
from build.spec import load
from tests.build import tiny_model

COUNT = 40
needs_pyav = pytest.mark.skipif(
    importlib.util.find_spec("av") is None and not (Path(sys.prefix) / "video" / "av").is_dir(),
    reason="needs PyAV: requirements/video.lock",
)


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """40 frames of 10 a second; each is as bright as its number."""
    av = frames._pyav()
    path = tmp_path / "film.avi"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mjpeg", rate=10)
        stream.width = stream.height = 16
        stream.pix_fmt = "yuvj420p"
        for number in range(COUNT):
            frame = av.VideoFrame.from_ndarray(np.full((16, 16, 3), 6 * number, np.uint8), format="rgb24")
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def numbers(paths: Any) -> list[int]:
    return [int(path.stem) for path in paths]


@needs_pyav
@pytest.mark.parametrize(("first", "second"), [(8, 8), (20, 3), (3, 20), (100, 100)])
def test_two_sets_are_spread_over_the_whole_film_and_share_no_frame(
    video: Path, tmp_path: Path, first: int, second: int
) -> None:
    here, there = (
        numbers(frames.extract(video, count, tmp_path, between=between))
        for count, between in ((first, False), (second, True))
    )
    assert [len(here), len(there)] == [min(first, COUNT // 2), min(second, COUNT // 2)]
    assert not set(here) & set(there)
    assert here[0] == 0
    assert here[-1] >= COUNT * (1 - 1 / len(here)) - 2
    for path in (video.parent).glob("film-*/*.png"):
        assert abs(np.asarray(datasets.open_picture(path)).mean() - 6 * int(path.stem)) < 6


@needs_pyav
def test_number_and_spread_are_told_and_frames_kept(
    video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    frames.extract(video, 8, tmp_path)
    assert "film.avi: 8 of 40 frames of 4 s, from frame 0 to 34, one in 5.0" in capsys.readouterr().err
    monkeypatch.setattr(frames, "_pyav", lambda: pytest.fail("it was read again"))
    assert len(frames.extract(video, 8, tmp_path)) == 8


@needs_pyav
def test_a_spec_names_one_video_for_both(video: Path, tmp_path: Path) -> None:
    path = tiny_model.write(tmp_path / "tiny")
    data = 'calibration = "../film.avi"\nheld_out = "../film.avi"\ncalibration_count = 5\nheld_out_count = 5'
    path.write_text(f'{path.read_text()}\n[data]\n{data}\nlabels_from = "fp32"\n')
    spec = load(path)
    assert len(datasets.calibration(spec, tmp_path)) == 5
    assert set(datasets.digest(spec)) == {"film.avi"}


@needs_pyav
def test_what_is_no_video(tmp_path: Path) -> None:
    (tmp_path / "film.mp4").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"film\.mp4: no video that can be read"):
        frames.extract(tmp_path / "film.mp4", 3, tmp_path)
    assert not list(tmp_path.glob("film-*"))


def test_without_pyav_the_command_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "film.mp4").write_bytes(b"nothing")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(RuntimeUnavailableError, match=r"needs PyAV[\s\S]*requirements/video\.lock"):
        frames.extract(tmp_path / "film.mp4", 3, tmp_path)
