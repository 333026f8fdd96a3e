"""Detections in the frames of a film, a camera or a stream, in order, with a bounded number of frames in memory.

It needs PyAV (`pip install './client[video]'`).
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from .client import SSDClient
from .detections import Detections
from .exceptions import InferenceError, SSDClientError
from .planes import painted, picture, quarter_turns

_JUMP = 1.0  # seconds; a time further back than this is of a clock that began anew
READ_TIMEOUT = 15.0  # seconds; a stream that sends nothing for so long has ended
_LIVE = ("rtsp", "rtsps", "rtmp", "rtmps", "rtp", "srt", "udp")  # what does not wait for its reader
# Try TCP first: over UDP, frames are damaged as soon as a packet is lost.
_OPTIONS = {"rtsp": {"rtsp_flags": "prefer_tcp"}, "rtsps": {"rtsp_flags": "prefer_tcp"}}


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


class Clock:
    """Times of a stream that grow from one to the next, as every container wants them.

    Recordings that were joined and cameras that were started again begin anew; some cameras send two frames at once.
    """

    def __init__(self) -> None:
        self._last: int | None = None
        self._offset = 0

    def next(self, at: int, time_base: Fraction) -> int:
        """How much a time has to be moved.

        Args:
            at: in ticks.
            time_base: seconds of a tick.
        """
        last = self._last
        if last is not None and at + self._offset <= last:
            if (last - at - self._offset) * time_base > _JUMP:
                self._offset = last + 1 - at
            else:
                self._last = last + 1
                return last + 1 - at
        self._last = at + self._offset
        return self._offset


@dataclass
class Film:
    """An open film, camera or stream.

    Attributes:
        start, end: seconds from the beginning; None = all of it.
        live: it does not wait: frames that come while the server is busy are left out.
        read_timeout: seconds; a stream that sends nothing for so long has ended.
        damage: what could not be read, one sentence each.
        left_out: how many frames of a live source were left out.
        packets: takes what is not video, in whatever thread reads.
    """

    container: Any
    stream: Any
    start: float = 0.0
    end: float | None = None
    live: bool = False
    read_timeout: float = READ_TIMEOUT
    damage: list[str] = field(default_factory=list)
    left_out: int = 0
    packets: Callable[[Any], None] | None = None

    @property
    def seconds(self) -> float | None:
        """How long the part is that was asked for; None if the film does not tell."""
        whole = self._length
        if whole is None:
            return None if self.end is None else self.end - self.start
        return max(0.0, min(whole, whole if self.end is None else self.end) - self.start)

    @property
    def _length(self) -> float | None:
        """Seconds until its pictures end: the audio may go on for longer."""
        stream = self.stream
        if stream.duration is not None:
            return float((stream.duration + (stream.start_time or 0)) * stream.time_base) - self.origin
        try:  # Matroska
            hours, minutes, seconds = stream.metadata["DURATION"].split(":")
            return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
        except (KeyError, ValueError):
            return None if self.container.duration is None else self.container.duration / 1_000_000

    @property
    def audio(self) -> list[Any]:
        """The audio streams."""
        return list(self.container.streams.audio)

    def frames(self) -> Iterator[Any]:
        """The frames of the part that was asked for. What is damaged is left out and noted in `damage`."""
        import av

        broken, last, bare, timed = 0, 0.0, 0, False
        streams = [self.stream, *(self.audio if self.packets is not None else [])]
        origin, clocks = self.origin, {stream.index: Clock() for stream in streams}
        if self.start:
            self.container.seek(int((self.start + origin) * 1_000_000), backward=True)
        packets = self.container.demux(*streams)
        while True:
            try:
                packet = next(packets, None)
            except (av.error.FFmpegError, OSError) as error:
                self.damage.append(f"it cannot be read after {last:.2f} s: {_reason(error, self.read_timeout)}")
                break
            if packet is None:
                break
            if packet.stream is not self.stream:
                if self.packets is not None and packet.dts is not None and self._wanted(packet):
                    moved = clocks[packet.stream.index].next(packet.dts, packet.time_base)
                    packet.dts += moved
                    packet.pts = None if packet.pts is None else packet.pts + moved
                    self.packets(packet)
                continue
            try:
                frames = packet.decode()
            except av.error.FFmpegError:
                broken += 1
                continue
            for frame in frames:
                if frame.pts is None and timed:
                    broken += 1
                    continue
                if frame.pts is None:  # a bare stream of pictures has no times: evenly, then
                    frame.time_base = 1 / Fraction(self.stream.average_rate or 25)
                    frame.pts, bare = bare, bare + 1
                else:
                    timed = True
                frame.pts += clocks[self.stream.index].next(frame.pts, frame.time_base)
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
            self.damage.append(
                "a packet or frame is damaged" if broken == 1 else f"{broken} packets or frames are damaged"
            )
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
        raise VideoError("films need PyAV, which is not installed", fix="pip install './client[video]'") from None
    av.logging.set_level(av.logging.FATAL)  # damage is told once, by Film
    return av


@contextlib.contextmanager
def opened(
    source: str,
    *,
    format: str | None = None,
    start: float = 0.0,
    end: float | None = None,
    live: bool | None = None,
    read_timeout: float = READ_TIMEOUT,
) -> Iterator[Film]:
    """A film for reading.

    Args:
        source: a path, a URL or a device.
        format: FFmpeg's name of the format, where it cannot be found out (a camera: v4l2).
        start, end: seconds; only frames in between.
        live: it does not wait for its reader; None = guess: a format was given, or a URL such as rtsp://.
        read_timeout: seconds; a stream that sends nothing for so long has ended.

    Raises:
        VideoError: it cannot be opened, or has no pictures.
    """
    av = require()
    scheme = source.partition("://")[0].lower() if "://" in source else ""
    try:
        container = av.open(source, format=format, options=_OPTIONS.get(scheme), timeout=read_timeout)
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise VideoError(
            f"{without_password(source)} cannot be opened: {_reason(error, read_timeout)}",
            why="it is no film, was cut off before its table of contents, or is not there",
            fix="check it with ffprobe; a camera needs --format v4l2",
        ) from None
    with container:
        films = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        if not films:
            raise VideoError(f"{without_password(source)} has no moving pictures", fix="give a film")
        films[0].thread_type = "AUTO"
        live = bool(format) or scheme in _LIVE if live is None else live
        yield Film(container, films[0], start, end, live, read_timeout)


def _reason(error: Exception, read_timeout: float) -> str:
    from av.error import ExitError

    if isinstance(error, ExitError):  # FFmpeg's word for the end of its patience
        return f"nothing came for {read_timeout:g} s"
    return str(getattr(error, "strerror", None) or error)


def without_password(source: str) -> str:
    """A URL as it may be shown."""
    return re.sub(r"(?<=://)[^/@]*:[^/@]*@", "***@", source)


@contextlib.contextmanager
def newest(film: Film) -> Iterator[Iterator[Any]]:
    """The frames of a live source, read in a thread: whoever takes the next one gets the newest."""
    changed = threading.Condition()
    waiting: list[Any] = []
    failed: list[BaseException] = []
    ended = stopped = False

    def read() -> None:
        nonlocal ended
        try:
            for frame in film.frames():
                with changed:
                    film.left_out += len(waiting)
                    waiting[:] = [frame]
                    changed.notify()
                    if stopped:
                        break
        except BaseException as error:
            failed.append(error)
        finally:
            with changed:
                ended = True
                changed.notify()

    def frames() -> Iterator[Any]:
        while True:
            with changed:
                changed.wait_for(lambda: waiting or ended)
                if not waiting:
                    break
                frame = waiting.pop()
            yield frame
        if failed:
            raise failed[0]

    thread = threading.Thread(target=read, name="ssd_video_reader", daemon=True)
    thread.start()
    try:
        yield frames()
    finally:
        stopped = True
        thread.join()  # nobody may close what it reads from


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
    source = newest(film) if film.live else contextlib.nullcontext(film.frames())
    with ThreadPoolExecutor(in_flight, "ssd_video") as threads, source as frames:
        try:
            for index, frame in enumerate(frames):
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
