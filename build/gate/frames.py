"""Frames of a video file as pictures, for calibration and audit. Reading video needs PyAV (requirements/video.lock)."""

from __future__ import annotations

import hashlib
import importlib
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from build import files
from build.errors import DataError, RuntimeUnavailableError

SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv")
_WHOLE = "frames.txt"


def extract(video: Path, count: int, cache: Path, *, between: bool = False) -> list[Path]:
    """Frames of a video as PNG files, spread evenly over its whole length; says how many and how far apart.

    Args:
        video: the file.
        count: how many at most.
        cache: where a folder of them is kept for the next time, by the file's contents.
        between: odd frames, where `between=False` takes even ones: another set of the same video.

    Returns:
        Their paths, in order.

    Raises:
        DataError: the file has no frames that can be read.
        RuntimeUnavailableError: PyAV is not installed.
    """
    about = hashlib.sha256(f"{files.sha256(video)} {count} {between}".encode()).hexdigest()[:16]
    folder = cache / f"{video.stem}-{about}"
    if (folder / _WHOLE).is_file():
        return sorted(folder.glob("*.png"))
    from rich.console import Console

    av = _pyav()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        with av.open(str(video)) as opened:
            total = sum(1 for _ in opened.decode(video=0))
        # Even frames for one set and odd ones for the other: no frame is in both, whatever their counts.
        chosen = {2 * (place * total // (2 * count)) + between for place in range(count)}
        with av.open(str(video)) as opened:
            rate = float(opened.streams.video[0].average_rate or 0)
            for number, frame in enumerate(opened.decode(video=0)):
                if number in chosen:
                    frame.to_image().save(folder / f"{number:06d}.png")
    except (av.FFmpegError, IndexError, OSError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise DataError(f"{video}: no video that can be read: {error}") from None
    paths = sorted(folder.glob("*.png"))
    if not paths:
        raise DataError(f"{video}: has no frames")
    first, last = int(paths[0].stem), int(paths[-1].stem)
    length = f" of {total / rate:.0f} s" if rate else ""
    text = (
        f"{video.name}: {len(paths)} of {total} frames{length}, from frame {first} to {last}, "
        f"one in {total / len(paths):.1f}"
    )
    (folder / _WHOLE).write_text(text + "\n")
    Console(stderr=True, soft_wrap=True).print(text, markup=False, highlight=False)
    return paths


def _pyav() -> Any:
    """PyAV, from the environment or from the folder of its own beside it."""
    for folder in ("", str(Path(sys.prefix) / "video")):
        if folder and folder not in sys.path:
            sys.path.append(folder)
        try:
            return importlib.import_module("av")
        except ImportError:
            continue
    raise RuntimeUnavailableError(
        "reading video needs PyAV, which is not installed",
        fix=f"{shlex.quote(sys.executable)} -m pip install --no-deps --require-hashes --target "
        f"{shlex.quote(f'{sys.prefix}/video')} -r requirements/video.lock; or give a folder of pictures",
    )
