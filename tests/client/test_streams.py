"""`ssd-client video` on streams: that stall, break off or begin anew, and live ones that do not wait."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from ssd_client import SSDClient, video
from ssd_client.cli import main
from ssd_client.video import Clock

from build.serve import TritonServer
from tests.client.conftest import listening, scene

pytestmark = pytest.mark.triton
PICTURES = [np.roll(scene(200, 100), 3 * k, axis=1) for k in range(20)]


@pytest.fixture(scope="module")
def transport_stream(pyav: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    from tests.client import films

    path = tmp_path_factory.mktemp("stream") / "in.ts"
    noise = np.random.default_rng(0).integers(0, 60, (100, 200, 3), np.uint8)
    films.write(path, [picture // 2 + np.roll(noise, k, 0) for k, picture in enumerate(PICTURES * 3)], audio="aac")
    return path.read_bytes()


def sending(data: bytes, stall: bool) -> AbstractContextManager[int]:
    """An HTTP server that sends these bytes without their length, and then nothing, or the end."""

    def handle(connection: socket.socket) -> None:
        with connection:
            connection.recv(1000)
            connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + data)
            if stall:
                connection.recv(1)  # until the reader goes

    return listening(handle)


@pytest.mark.parametrize("stall", [True, False])
def test_what_came_of_a_stream_is_kept(
    server: TritonServer,
    transport_stream: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stall: bool,
) -> None:
    from tests.client import films

    monkeypatch.chdir(tmp_path)
    with sending(transport_stream[: len(transport_stream) // 2], stall) as port:
        source = f"http://me:secret@127.0.0.1:{port}/stream"
        arguments = [source, "--out", "out.mp4", "--json", "found.jsonl", "--read-timeout", "1"]
        status = main(["video", *arguments, "--url", server.grpc_url, "--model", "fake"])
    said = capsys.readouterr().err
    count = len(Path("found.jsonl").read_text().splitlines())
    assert 15 < count < 45
    assert len(films.read(tmp_path / "out.mp4")["times"]) == count
    assert status == 1, said
    assert f"http://***@127.0.0.1:{port}/stream: it cannot be read after" in said
    assert ("nothing came for 1 s" in said) == stall
    assert "secret" not in said


def test_joined_recordings_go_on_where_the_first_ends(
    server: TritonServer, transport_stream: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.client import films

    monkeypatch.chdir(tmp_path)
    Path("in.ts").write_bytes(2 * transport_stream)
    arguments = ["in.ts", "--out", "out.mp4", "--json", "found.jsonl", "--url", server.grpc_url, "--model", "fake"]
    main(["video", *arguments])
    seconds = [json.loads(line)["seconds"] for line in Path("found.jsonl").read_text().splitlines()]
    assert len(seconds) >= 110
    assert all(np.diff(seconds) > 0)
    times = films.read(tmp_path / "out.mp4")["times"]
    assert len(times) == len(seconds)
    assert times[-1] == pytest.approx(4.8, abs=0.3)


def test_a_bare_stream_of_pictures_has_even_times(
    server: TritonServer, transport_stream: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.client import films

    monkeypatch.chdir(tmp_path)
    films.write(tmp_path / "in.h264", PICTURES)
    arguments = ["in.h264", "--out", "out.mp4", "--json", "found.jsonl", "--url", server.grpc_url, "--model", "fake"]
    assert main(["video", *arguments]) == 0
    seconds = [json.loads(line)["seconds"] for line in Path("found.jsonl").read_text().splitlines()]
    assert seconds == [index / 25 for index in range(20)]
    assert films.read(tmp_path / "out.mp4")["times"] == seconds


def test_times_grow() -> None:
    def moved(*times: int) -> list[int]:
        clock = Clock()
        return [at + clock.next(at, Fraction(1, 100)) for at in times]

    assert moved(0, 4, 8) == [0, 4, 8]
    assert moved(0, 8, 4, 12) == [0, 8, 9, 12]  # in the wrong order
    assert moved(5, 5, 5, 6, 10) == [5, 6, 7, 8, 10]
    assert moved(900, 904, 0, 4, 8) == [900, 904, 905, 909, 913]  # begun anew
    assert moved(0, 10_000, 10_004) == [0, 10_000, 10_004]  # a pause stays


def test_a_live_source_is_not_waited_for(pyav: Path, server: TritonServer, monkeypatch: pytest.MonkeyPatch) -> None:
    import av

    film = video.Film(SimpleNamespace(start_time=0), None, live=True)

    def frames() -> Iterator[Any]:
        for index in range(40):
            frame = av.VideoFrame.from_ndarray(PICTURES[0], format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = index, Fraction(1, 100)
            yield frame
            time.sleep(0.01)

    with SSDClient(server.grpc_url, model="fake") as client:
        detect = client.detect

        def slow(image: Image.Image, **options: Any) -> Any:
            time.sleep(0.1)
            return detect(image, **options)

        monkeypatch.setattr(client, "detect", slow)
        monkeypatch.setattr(film, "frames", frames)
        found = list(video.detect(film, client, in_flight=2, draw=False))
    assert 5 < len(found) < 25
    assert len(found) + film.left_out == 40
    times = [frame.pts for frame in found]
    assert times == sorted(times)
    assert times[-1] > 35, "it lags behind"
    assert [frame.index for frame in found] == list(range(len(found)))


def test_what_goes_wrong_in_a_live_source_is_told(pyav: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    film = video.Film(SimpleNamespace(start_time=0), None, live=True)

    def broken() -> Iterator[Any]:
        yield from ()
        raise video.VideoError("the disk is full")

    monkeypatch.setattr(film, "frames", broken)
    with SSDClient("localhost:9", model="fake") as client, pytest.raises(video.VideoError, match="disk is full"):
        list(video.detect(film, client))


@pytest.mark.parametrize(
    ("source", "format", "live"),
    [("in.ts", None, False), ("in.ts", "mpegts", True)],
)
def test_which_sources_are_live(
    transport_stream: bytes, tmp_path: Path, source: str, format: str | None, live: bool
) -> None:
    path = tmp_path / source
    path.write_bytes(transport_stream)
    with video.opened(os.fspath(path), format=format) as film:
        assert film.live == live
    with video.opened(os.fspath(path), format=format, live=not live) as film:
        assert film.live != live
