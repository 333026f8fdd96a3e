"""Detections in the frames of a film, a camera or a stream, in order, with a bounded number of frames in memory.

It needs PyAV (`pip install 'ssd-client[video]'`).
"""

from __future__ import annotations

import contextlib
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from .client import SSDClient
from .detections import Detections
from .exceptions import InferenceError, SSDClientError
from .planes import FORMAT, painted, picture, quarter_turns

_OPEN_SECONDS, _READ_SECONDS = 15.0, 15.0  # a stream that sends nothing for so long has ended


class VideoError(SSDClientError):
    """A film cannot be opened, read or written."""


@dataclass(frozen=True)
class Frame:
    """One frame and what was found in it.

    Attributes:
        index: its number, from 0 at the start that was asked for.
        seconds: when it is shown, from the beginning of the film.
        detections: what was found; of a frame that was left out, what was found last.
        asked: whether this frame was sent to the server.
        error: why the server did not answer for it.
        drawn: the picture to encode, a frame of PyAV (see `planes.painted`); None if none was asked for.
        turned: whether width and height of the picture are exchanged in the film.
        pts, time_base, duration: as the film has them.
    """

    index: int
    seconds: float
    detections: Detections | None
    asked: bool
    error: str
    drawn: Any
    turned: bool
    pts: int
    time_base: Fraction
    duration: int


@dataclass
class Film:
    """An open film, camera or stream.

    Attributes:
        damage: what could not be read, one sentence each.
        start, end: seconds from the beginning; None = all of it.
    """

    container: Any
    stream: Any
    start: float = 0.0
    end: float | None = None
    damage: list[str] = field(default_factory=list)
    packets: Callable[[Any], None] | None = None  # takes what is not video

    @property
    def seconds(self) -> float | None:
        """How long the part is that was asked for; None if the film does not tell."""
        if self.container.duration is None:
            return None if self.end is None else self.end - self.start
        whole: float = self.container.duration / 1_000_000
        return max(0.0, min(whole, whole if self.end is None else self.end) - self.start)

    @property
    def audio(self) -> list[Any]:
        """The audio streams."""
        return list(self.container.streams.audio)

    def frames(self) -> Iterator[Any]:
        """The frames of the part that was asked for. What is damaged is left out and noted in `damage`."""
        import av

        broken, last = 0, 0.0
        streams = [self.stream, *(self.audio if self.packets is not None else [])]
        origin = self.origin
        if self.start:
            self.container.seek(int((self.start + origin) * 1_000_000), backward=True)
        packets = self.container.demux(*streams)
        while True:
            try:
                packet = next(packets, None)
            except (av.error.FFmpegError, OSError) as error:
                self.damage.append(f"it cannot be read after {last:.2f} s: {error.strerror or error}")
                break
            if packet is None:
                break
            if packet.stream is not self.stream:
                if self.packets is not None and packet.dts is not None and self._wanted(packet):
                    self.packets(packet)
                continue
            try:
                frames = packet.decode()
            except av.error.FFmpegError:
                broken += 1
                continue
            for frame in frames:
                if frame.pts is None:
                    broken += 1
                    continue
                seconds = float(frame.pts * frame.time_base) - origin
                if seconds < self.start - 1e-6:
                    continue
                if self.end is not None and seconds >= self.end - 1e-6:
                    return self._note(broken, None)
                broken += bool(frame.is_corrupt)
                last = seconds
                yield frame
        return self._note(broken, last)

    @property
    def origin(self) -> float:
        """Where the film's clock begins, in seconds."""
        return (self.container.start_time or 0) / 1_000_000

    def _wanted(self, packet: Any) -> bool:
        at = float(packet.dts * packet.time_base) - self.origin
        return (not self.start or self.start - 1e-6 <= at) and (self.end is None or at < self.end)

    def _note(self, broken: int, last: float | None) -> None:
        if broken:
            self.damage.append(f"{broken} packets or frames are damaged")
        whole = self.seconds
        if last is not None and whole is not None and self.start + whole - last > max(1.0, 0.02 * whole):
            self.damage.append(f"it should end at {self.start + whole:.2f} s, but its last frame is at {last:.2f} s")


def require() -> Any:
    """PyAV.

    Raises:
        VideoError: it is not installed.
    """
    try:
        import av
    except ImportError:
        raise VideoError("films need PyAV, which is not installed", fix="pip install 'ssd-client[video]'") from None
    av.logging.set_level(av.logging.FATAL)  # damage is told once, by Film
    return av


@contextlib.contextmanager
def opened(source: str, *, format: str | None = None, start: float = 0.0, end: float | None = None) -> Iterator[Film]:
    """A film for reading.

    Args:
        source: a path, a URL or a device.
        format: FFmpeg's name of the format, where it cannot be found out (a camera: v4l2).
        start, end: seconds; only frames in between.

    Raises:
        VideoError: it cannot be opened, or has no pictures.
    """
    av = require()
    try:
        container = av.open(source, format=format, timeout=(_OPEN_SECONDS, _READ_SECONDS))
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise VideoError(
            f"{source} cannot be opened: {getattr(error, 'strerror', None) or error}",
            why="it is no film, was cut off before its table of contents, or is not there",
            fix="check it with ffprobe; a camera needs --format v4l2",
        ) from None
    with container:
        films = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        if not films:
            raise VideoError(f"{source} has no moving pictures", fix="give a film")
        films[0].thread_type = "AUTO"
        yield Film(container, films[0], start, end)


def detect(
    film: Film,
    client: SSDClient,
    *,
    every: int = 1,
    in_flight: int = 4,
    draw: bool = True,
    score_threshold: float | None = None,
    iou_threshold: float | None = None,
) -> Iterator[Frame]:
    """What is in the frames of a film, in order.

    Args:
        film: from `opened`.
        client: of the model.
        every: ask the server for every so many frames; those between get the boxes of the last one before.
        in_flight: frames that are worked on at once, and as many in memory.
        draw: make the pictures with boxes, too. Without, only frames that were asked for are given.
        score_threshold, iou_threshold: see `SSDClient.detect`.

    Raises:
        SSDClientError: the server went away, or cannot serve this model.
    """

    def work(index: int, frame: Any, found: Future[Detections | None], asked: bool) -> Frame:
        error = ""
        if asked:
            try:
                found.set_result(
                    client.detect(picture(frame), score_threshold=score_threshold, iou_threshold=iou_threshold)
                )
            except InferenceError as failed:
                error = str(failed)
                found.set_result(None)
            except BaseException as failed:
                found.set_exception(failed)
        detections = found.result()
        return Frame(
            index,
            float(frame.pts * frame.time_base) - film.origin,
            detections,
            asked,
            error,
            painted(frame, detections) if draw else None,
            bool(quarter_turns(frame) % 2),
            frame.pts,
            frame.time_base,
            frame.duration or 0,
        )

    running: deque[Future[Frame]] = deque()
    found: Future[Detections | None] = Future()
    with ThreadPoolExecutor(in_flight, "ssd_video") as threads:
        try:
            for index, frame in enumerate(film.frames()):
                asked = index % every == 0
                if asked:
                    found = Future()
                elif not draw:
                    continue
                if len(running) >= in_flight:
                    yield running.popleft().result()
                running.append(threads.submit(work, index, frame, found, asked))
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()


class Writer:
    """A film that appears at `path` when it is closed, with the boxes drawn and the audio of the original.

    Args:
        path: its suffix names the container.
        film: the original.
        codec: FFmpeg's name of the encoder.
        options: of the encoder.
    """

    def __init__(self, path: Path, film: Film, codec: str = "libx264", options: dict[str, str] | None = None) -> None:
        self._av = require()
        self._path, self._film = path, film
        self._part = path.with_name(f".{uuid.uuid4().hex[:8]}.{path.name[-50:]}")
        self._codec, self._options = codec, {"preset": "veryfast", "crf": "20"} if options is None else options
        self._stream: Any = None
        self._durations: dict[int, int] = {}  # of the frames inside the encoder, by their time
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._container = self._av.open(str(self._part), "w")
            self._audio = {s.index: self._container.add_stream_from_template(s) for s in film.audio}
        except (self._av.error.FFmpegError, OSError, ValueError) as error:
            self.discard()
            raise self._failed(error) from None
        film.packets = self._copy
        self._early: list[Any] = []  # audio from before the first frame, whose size the header needs

    def write(self, frame: Frame) -> None:
        """Append a frame.

        Raises:
            VideoError: it cannot be encoded or written.
        """
        drawn = frame.drawn
        try:
            if self._stream is None:
                self._begin(frame)
            if (drawn.width, drawn.height) != (self._stream.width, self._stream.height):  # a stream may change its size
                drawn = drawn.reformat(self._stream.width, self._stream.height)
            drawn.pts = frame.pts - round(self._shift / frame.time_base)
            drawn.time_base = frame.time_base
            self._durations[drawn.pts] = frame.duration
            self._encode(drawn)
        except (self._av.error.FFmpegError, OSError, ValueError) as error:
            raise self._failed(error) from None

    @property
    def _shift(self) -> Fraction:
        return Fraction(self._film.start + (self._film.origin if self._film.start else 0)).limit_denominator(1_000_000)

    def _begin(self, frame: Frame) -> None:
        source, drawn = self._film.stream, frame.drawn
        stream = self._container.add_stream(self._codec, rate=source.average_rate or 25, options=self._options)
        stream.width, stream.height, stream.pix_fmt = drawn.width, drawn.height, FORMAT
        stream.time_base = stream.codec_context.time_base = frame.time_base
        context, original = stream.codec_context, source.codec_context
        context.color_range, context.colorspace = drawn.color_range, drawn.colorspace
        context.color_primaries, context.color_trc = original.color_primaries, original.color_trc
        shape = original.sample_aspect_ratio
        if shape:
            context.sample_aspect_ratio = 1 / shape if frame.turned else shape
        self._stream = stream
        self._container.start_encoding()
        for packet in self._early:
            self._copy(packet)
        self._early.clear()

    def _encode(self, picture: Any) -> None:
        for packet in self._stream.encode(picture):
            # The encoder knows when a frame begins, and only the film how long the last one stays.
            packet.duration = self._durations.pop(packet.pts, 0) or packet.duration
            self._container.mux(packet)

    def _copy(self, packet: Any) -> None:
        """Take over an audio packet as it is."""
        if self._stream is None:
            self._early.append(packet)
            return
        shift = round(self._shift / packet.time_base)
        packet.pts = None if packet.pts is None else packet.pts - shift
        packet.dts -= shift
        packet.stream = self._audio[packet.stream.index]
        self._container.mux(packet)

    def close(self) -> bool:
        """Finish the film and put it at its place; whether there is one.

        Raises:
            VideoError: it cannot be written.
        """
        if self._stream is None:
            self.discard()
            return False
        try:
            self._encode(None)
            self._container.close()
            self._part.replace(self._path)
        except (self._av.error.FFmpegError, OSError, ValueError) as error:
            self.discard()
            raise self._failed(error) from None
        return True

    def discard(self) -> None:
        """Leave nothing behind."""
        with contextlib.suppress(Exception):
            self._container.close()
        self._part.unlink(missing_ok=True)

    def _failed(self, error: Exception) -> VideoError:
        codecs = ", ".join(s.codec_context.name for s in self._film.audio) or "none"
        return VideoError(
            f"{self._path} cannot be written: {getattr(error, 'strerror', None) or error}",
            why=f"the disk is full, the folder is write-protected, FFmpeg lacks the encoder {self._codec}, or files "
            f"that end in {self._path.suffix or 'nothing'} cannot hold the audio ({codecs})",
            fix="try another place, or --out NAME.mkv, which holds nearly everything",
        )
