"""`ssd-client video` on films made here, as a process of its own with PyAV, against the fake detector."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image
from ssd_client import SSDClient
from ssd_client.cli import main

from build.serve import TritonServer
from tests.client.conftest import scene

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.triton


Video = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def environment(pyav: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(pyav), str(ROOT / "client")])}


@pytest.fixture
def video(environment: dict[str, str], server: TritonServer, tmp_path: Path) -> Video:
    """Runs the command in `tmp_path`."""

    def call(*arguments: str, model: str = "fake") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ssd_client", "video", *arguments]
        command += ["--url", server.grpc_url, "--model", model]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)

    return call


PICTURES = [np.roll(scene(200, 100), 3 * k, axis=1) for k in range(20)]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_frames_times_and_audio_stay(video: Video, server: TritonServer, tmp_path: Path) -> None:
    from tests.client import films

    times = [0, 40, 50, 200, 210, 500, 900, *range(1000, 1130, 10)]
    films.write(tmp_path / "in.mp4", PICTURES, times=times, audio="aac")
    done = video("in.mp4", "--out", "out.mp4", "--json", "found.jsonl", "--score-threshold", "0.55")
    assert (done.returncode, done.stderr) == (0, "20 frames, 40 detections, film in out.mp4\n")
    before, after = films.read(tmp_path / "in.mp4"), films.read(tmp_path / "out.mp4")
    assert after["times"] == before["times"] == [t / 1000 for t in times]
    assert after["duration"] == before["duration"]
    assert (after["codec"], after["sound"]) == ("aac", before["sound"])
    found = lines(tmp_path / "found.jsonl")
    assert [(line["frame"], line["seconds"]) for line in found] == [(k, t / 1000) for k, t in enumerate(times)]
    with SSDClient(server.grpc_url, model="fake") as client:
        for line, picture, drawn in zip(found, before["pictures"], after["pictures"], strict=True):
            wanted = client.detect(picture, score_threshold=0.55)
            assert line["detections"] == wanted.to_dicts()
            assert (line["width"], line["height"], line["error"]) == (200, 100, "")
            assert np.abs(drawn.astype(int) - np.asarray(wanted.draw())).mean() < 6
    assert names(tmp_path) == {"in.mp4", "out.mp4", "found.jsonl"}


def test_a_turned_film_comes_upright_and_odd_sizes_are_filled(video: Video, tmp_path: Path) -> None:
    import av

    from tests.client import films

    bt709 = {"colorspace": 1, "color_primaries": 1, "color_trc": 1}
    films.write(tmp_path / "in.mp4", PICTURES[:3], quarter_turns=1, sample_aspect_ratio=Fraction(4, 3), **bt709)
    assert video("in.mp4", "--out", "out.mkv", "--json", "-", "--score-threshold", "0.99").returncode == 0
    with av.open(str(tmp_path / "out.mkv")) as container:
        stream = container.streams.video[0]
        assert stream.sample_aspect_ratio == Fraction(3, 4)
        assert {name: getattr(stream.codec_context, name) for name in bt709} == bt709
    before, after = films.read(tmp_path / "in.mp4"), films.read(tmp_path / "out.mkv")
    assert after["pictures"][0].shape == (200, 100, 3)
    assert np.abs(after["pictures"][0].astype(int) - np.rot90(before["pictures"][0], -1)).mean() < 6
    films.write(tmp_path / "odd.avi", [scene(101, 51)[:, :, ::1]], codec="ffv1")
    assert video("odd.avi", "--out", "odd.mp4").returncode == 0
    assert films.read(tmp_path / "odd.mp4")["pictures"][0].shape == (52, 102, 3)


def test_a_part_and_every_nth_frame(video: Video, server: TritonServer, tmp_path: Path) -> None:
    from tests.client import films

    films.write(tmp_path / "in.mp4", PICTURES, rate=10, audio="aac")
    options = ("--start", "0.5", "--end", "1.5", "--every", "4", "--score-threshold", "0.55")
    done = video("in.mp4", "--out", "out.mp4", "--json", "found.jsonl", *options)
    assert done.returncode == 0, done.stderr
    found = lines(tmp_path / "found.jsonl")
    assert [(line["frame"], line["seconds"]) for line in found] == [(0, 0.5), (4, 0.9), (8, 1.3)]
    part = films.read(tmp_path / "out.mp4")
    assert part["times"] == pytest.approx([k / 10 for k in range(10)], abs=0.001)
    assert part["duration"] == pytest.approx(1.0, abs=0.05)
    assert 0.4 < len(part["sound"]) / len(films.read(tmp_path / "in.mp4")["sound"]) < 0.6
    # A frame in between has the boxes of the one before that was asked for.
    whole = films.read(tmp_path / "in.mp4")["pictures"]
    with SSDClient(server.grpc_url, model="fake") as client:
        wanted = client.detect(whole[5], score_threshold=0.55).draw(Image.fromarray(whole[8]))
    assert np.abs(part["pictures"][3].astype(int) - np.asarray(wanted)).mean() < 6
    done = video("in.mp4", "--no-video", "--out", "never.mp4", "--json", "-", "--every", "10")
    assert [json.loads(line)["frame"] for line in done.stdout.splitlines()] == [0, 10]
    assert "never.mp4" not in names(tmp_path)


def test_what_a_damaged_film_still_has(video: Video, tmp_path: Path) -> None:
    from tests.client import films

    noise = np.random.default_rng(0).integers(0, 256, (100, 200, 3), np.uint8)
    films.write(tmp_path / "whole.mkv", [np.where(noise > 200, noise, p) for p in PICTURES] * 4, rate=20, audio="aac")
    data = (tmp_path / "whole.mkv").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(data[: len(data) // 2])
    (tmp_path / "cut.mkv").rename(tmp_path / "c\x1but.mkv")  # a name must not reach the terminal's controls
    done = video("c\x1but.mkv", "--out", "out.mkv", "--json", "found.jsonl")
    assert done.returncode == 1, done.stderr
    assert "c\\x1but.mkv: " in done.stderr
    assert "\x1b" not in done.stderr
    assert "it should end at 4.00 s, but its last frame is at" in done.stderr
    count = len(lines(tmp_path / "found.jsonl"))
    assert 20 < count < 60
    assert len(films.read(tmp_path / "out.mkv")["times"]) == count
    films.write(tmp_path / "plain.mp4", [np.where(noise > 200, noise, p) for p in PICTURES] * 2)
    data = (tmp_path / "plain.mp4").read_bytes()
    hole = slice(len(data) // 3, len(data) // 3 + 9000)  # the pictures; the table of contents is at the end
    (tmp_path / "holes.mp4").write_bytes(data[: hole.start] + bytes(9000) + data[hole.stop :])
    done = video("holes.mp4", "--json", "-")
    assert done.returncode == 1, done.stderr
    assert "damaged" in done.stderr or "cannot be read" in done.stderr
    assert done.stdout.count("\n") > 10
    (tmp_path / "none.mp4").write_bytes(b"\0\0\0\x20ftypisom" + bytes(500))
    done = video("none.mp4", "--out", "lost.mp4")
    assert (done.returncode, done.stdout) == (2, "")
    assert "none.mp4 cannot be opened" in done.stderr
    assert not {name for name in names(tmp_path) if "lost" in name or name.startswith(".")}


def test_ctrl_c_keeps_what_is_done(environment: dict[str, str], server: TritonServer, tmp_path: Path) -> None:
    from tests.client import films

    films.write(tmp_path / "in.mkv", PICTURES[:1] * 1500)
    command = [sys.executable, "-m", "ssd_client", "video", "in.mkv", "--out", "out.mp4", "--json", "found.jsonl"]
    command += ["--url", server.grpc_url, "--model", "fake", "--in-flight", "1"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not any(name.startswith(".found") for name in names(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert "stopped by Ctrl-C or SIGTERM" in errors
    count = len(lines(tmp_path / "found.jsonl"))
    assert 2 <= count < 1500
    assert len(films.read(tmp_path / "out.mp4")["times"]) == count
    assert names(tmp_path) == {"in.mkv", "out.mp4", "found.jsonl"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["in.mp4"], "nothing to write"),
        (["in.mp4", "--out", "in.mp4"], "--out in.mp4 is the film itself"),
        (["in.mp4", "--json", "./in.mp4"], "is the film itself"),
        (["in.mp4", "--json", "-", "--every", "0"], "--every is 0"),
        (["in.mp4", "--json", "-", "--start", "3", "--end", "2"], "the end after the start"),
        (["in.mp4", "--json", "-", "--start", "99"], "has no frame between 99 s and its end"),
        (["nothing.mp4", "--json", "-"], "nothing.mp4 cannot be opened"),
        (["in.mp4", "--out", "x.nothing"], "x.nothing cannot be written"),
        (["in.mp4", "--out", "in.mp4/x.mp4"], "in.mp4/x.mp4 cannot be written"),
        (["in.mp4", "--out", "x.mp4", "--codec", "aac"], "aac encodes no pictures"),
        (["in.mp4", "--out", "x.mp4", "--json", "x.mp4"], "--out and --json are both x.mp4"),
        (["in.mp4", "--json", "-", "--read-timeout", "0"], "--read-timeout is 0"),
        (["rtsp://me:secret@127.0.0.1:9/", "--json", "-"], "rtsp://***@127.0.0.1:9/ cannot be opened"),
        (["in.mp4", "--out", "x.mp4", "--codec", "nothing"], "lacks the encoder nothing"),
        (["sound.mp4", "--json", "-"], "no moving pictures"),
        (["in.mp4", "--json", "-", "--score-threshold", "2"], "give numbers in 0..1"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_errors(
    pyav: Path,
    server: TritonServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    import av

    from tests.client import films

    monkeypatch.chdir(tmp_path)
    films.write(tmp_path / "in.mp4", PICTURES[:5])
    films.write(tmp_path / "both.mp4", PICTURES[:5], audio="aac")
    with av.open("both.mp4") as source, av.open("sound.mp4", "w") as target:
        stream = target.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(source.streams.audio[0]):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    before = names(tmp_path)
    assert main(["video", *arguments, "--url", server.grpc_url, "--model", "fake"]) == 2
    assert words in capsys.readouterr().err
    assert names(tmp_path) == before


def test_without_pyav(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    assert main(["video", "in.mp4", "--json", "-", "--model", "fake"]) == 2
    assert "pip install './client[video]'" in capsys.readouterr().err


@pytest.mark.long
def test_memory_does_not_grow_with_the_film(environment: dict[str, str], server: TritonServer, tmp_path: Path) -> None:
    from tests.client import films

    films.write(tmp_path / "in.mp4", [np.asarray(scene(1280, 720))] * 800, audio="aac")
    command = [sys.executable, "-m", "ssd_client", "video", "in.mp4", "--out", "out.mp4"]
    command += ["--url", server.grpc_url, "--model", "fake"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment)
    sizes = []
    while process.poll() is None:
        try:
            sizes.append(psutil.Process(process.pid).memory_info().rss / 2**20)
        except psutil.Error:
            break
        time.sleep(0.2)
    assert process.wait() == 0
    print(f"resident MiB: {sizes[len(sizes) // 4]:.0f} after a quarter, at most {max(sizes):.0f}")
    assert max(sizes) < 1.15 * max(sizes[: len(sizes) // 4])


def test_whoever_reads_the_lines_may_have_seen_enough(
    environment: dict[str, str], server: TritonServer, tmp_path: Path
) -> None:
    from tests.client import films

    films.write(tmp_path / "in.mp4", PICTURES * 10)
    command = [sys.executable, "-m", "ssd_client", "video", "in.mp4", "--json", "-"]
    command += ["--url", server.grpc_url, "--model", "fake"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline().startswith(b"{")
    process.stdout.close()
    assert process.wait(60) == 2
    assert process.stderr.read() == b""
