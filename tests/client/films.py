"""Makes films with audio, uneven times, a rotation or damage out of pictures; run with PyAV on the path."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

RATE = 44_100


def write(
    path: Path,
    pictures: Sequence[Any],
    *,
    rate: int = 25,
    times: Sequence[int] | None = None,
    audio: str = "",
    codec: str = "libx264",
    quarter_turns: int = 0,
    **tags: Any,
) -> None:
    """A film of RGB arrays.

    Args:
        path: its suffix names the container.
        pictures: UINT8 [H,W,3] each.
        rate: frames a second.
        times: of each frame, in thousandths of a second; None = evenly.
        audio: a codec for a tone as long as the film; "" = none.
        codec: of the pictures.
        quarter_turns: what the film tells a player to turn it by, clockwise (mp4).
        tags: attributes of the encoder, such as `colorspace`.
    """
    height, width = pictures[0].shape[:2]
    with av.open(str(path), "w") as container:
        options = {"crf": "10", "preset": "veryfast"} if codec == "libx264" else {}
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000 if times is not None else rate)
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        sound = container.add_stream(audio, rate=RATE) if audio else None
        seconds = len(pictures) / rate if times is None else times[-1] / 1000 + 1 / rate
        for index, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24").reformat(format="yuv420p")
            frame.pts = index if times is None else times[index]
            frame.time_base = stream.codec_context.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound is not None:
            tone = np.sin(np.arange(int(seconds * RATE)) * 0.06).astype(np.float32)
            for start in range(0, len(tone), 1024):
                part = av.AudioFrame.from_ndarray(tone[None, start : start + 1024], format="fltp", layout="mono")
                part.sample_rate, part.pts, part.time_base = RATE, start, Fraction(1, RATE)
                container.mux(sound.encode(part))
            container.mux(sound.encode(None))
    if quarter_turns:
        data = bytearray(path.read_bytes())
        matrix = data.index(b"tkhd") + 4 + 40
        cosine, sine = ((1, 0), (0, 1), (-1, 0), (0, -1))[quarter_turns % 4]
        one = 1 << 16
        values = (cosine * one, sine * one, 0, -sine * one, cosine * one, 0, 0, 0, 1 << 30)
        data[matrix : matrix + 36] = struct.pack(">9i", *values)
        path.write_bytes(data)


def read(path: Path) -> dict[str, Any]:
    """What is in a film: times and pictures of its frames, its duration, its packets of audio."""
    with av.open(str(path)) as container:
        frames = [(float(f.pts * f.time_base), f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]
        duration = container.duration / 1_000_000
    sound = b""
    with av.open(str(path)) as container:
        if container.streams.audio:
            sound = b"".join(bytes(packet) for packet in container.demux(container.streams.audio[0]))
            codec = container.streams.audio[0].codec_context.name
        else:
            codec = ""
    return {
        "times": [time for time, _ in frames],
        "pictures": [picture for _, picture in frames],
        "duration": duration,
        "sound": sound,
        "codec": codec,
    }
