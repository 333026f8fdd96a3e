"""Writes a film with boxes: the pictures encoded again, the audio and all times as they were."""

from __future__ import annotations

import contextlib
import threading
import uuid
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

from .planes import FORMAT
from .video import Film, Frame, VideoError, require

_ENCODER = "libx264"
_OPTIONS_OF = {
    _ENCODER: {"preset": "veryfast", "crf": "20"},
    "vp9": {"deadline": "realtime", "cpu-used": "8", "crf": "24", "b": "0"},
}


class Writer:
    """A film that appears at `path` when it is closed, with the boxes drawn and the audio of the original.

    Args:
        path: its suffix names the container.
        film: the original.
        codec: FFmpeg's name of the encoder; None = libx264, for WebM vp9.

    Raises:
        VideoError: it cannot be written, or there is no such encoder.
    """

    def __init__(self, path: Path, film: Film, codec: str | None = None) -> None:
        self._av = require()
        self._path, self._film = path.resolve(), film
        self._part = self._path.with_name(f".{uuid.uuid4().hex[:8]}.{path.name[-50:]}")
        self._codec = codec or _ENCODER
        self._lock = threading.Lock()  # pictures and audio may come from two threads
        self._stream: Any = None
        self._durations: dict[int, int] = {}  # of the frames inside the encoder, by their time
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._container = self._av.open(str(self._part), "w")
            if codec is None and self._container.default_video_codec in _OPTIONS_OF:  # WebM, which cannot hold H.264
                self._codec = self._container.default_video_codec
            if self._av.Codec(self._codec, "w").type != "video":
                raise ValueError(f"{self._codec} encodes no pictures")
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
        with self._lock, self._explained():
            if self._stream is None:
                self._begin(frame)
            if (drawn.width, drawn.height) != (self._stream.width, self._stream.height):  # a stream may change its size
                drawn = drawn.reformat(self._stream.width, self._stream.height)
            drawn.pts = frame.pts - round(self._shift / frame.time_base)
            drawn.time_base = frame.time_base
            self._durations[drawn.pts] = frame.duration
            self._encode(drawn)

    @property
    def _shift(self) -> Fraction:
        return Fraction(self._film.start + (self._film.origin if self._film.start else 0)).limit_denominator(1_000_000)

    def _begin(self, frame: Frame) -> None:
        source, drawn = self._film.stream, frame.drawn
        stream = self._container.add_stream(
            self._codec, rate=source.average_rate or 25, options=_OPTIONS_OF.get(self._codec)
        )
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
            self._mux_audio(packet)
        self._early.clear()

    def _encode(self, picture: Any) -> None:
        for packet in self._stream.encode(picture):
            # The encoder knows when a frame begins, and only the film how long the last one stays.
            packet.duration = self._durations.pop(packet.pts, 0) or packet.duration
            self._container.mux(packet)

    def _copy(self, packet: Any) -> None:
        """Take over an audio packet as it is."""
        with self._lock, self._explained():
            if self._stream is None:
                self._early.append(packet)
            else:
                self._mux_audio(packet)

    def _mux_audio(self, packet: Any) -> None:
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
        with contextlib.suppress(OSError):  # such as: its folder is a file
            self._part.unlink()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (self._av.error.FFmpegError, OSError, ValueError) as error:
            raise self._failed(error) from None

    def _failed(self, error: Exception) -> VideoError:
        codecs = ", ".join(s.codec_context.name for s in self._film.audio) or "none"
        return VideoError(
            f"{self._path} cannot be written: {getattr(error, 'strerror', None) or error}",
            why=f"the disk is full, the folder is write-protected, FFmpeg lacks the encoder {self._codec}, or files "
            f"that end in {self._path.suffix or 'nothing'} cannot hold its pictures or the audio ({codecs})",
            fix="try another place, or --out NAME.mkv, which holds nearly everything",
        )
