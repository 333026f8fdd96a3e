"""`ssd-client video FILM --model NAME`: detections in a film, a camera or a stream.

Exit status: 0 done, 1 done as far as the film could be read, 2 nothing could be done or the server went away.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .client import SSDClient
from .exceptions import InvalidInputError, SSDClientError
from .options import add_server_options, client_options
from .output import replacing
from .text import escaped
from .video import READ_TIMEOUT, Film, Frame, detect, opened, without_password
from .video_writer import Writer

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h

_EPILOG = """\
--json writes one line for each frame that was asked for:
  {"frame": 0, "seconds": 0.0, "width": W, "height": H,
   "detections": [{"box": [x1, y1, x2, y2] in pixels, "score", "class_id", "label"}], "error": "" or why there are none}

--out keeps the frames, their times and the audio as they are, and turns the pictures upright.
Ctrl-C ends a camera or a stream; what was done until then is kept.

exit status: 0 done, 1 done as far as the film could be read, 2 nothing could be done or the server went away
"""


def run(argv: Sequence[str]) -> int:
    """Run the subcommand.

    Args:
        argv: arguments after `video`.

    Returns:
        The exit status.

    Raises:
        SSDClientError: nothing could be done.
    """
    return _run(_parser().parse_args(argv))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ssd-client video",
        description="Find objects in the frames of a film, a camera or a stream.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("input", metavar="FILM", help="a file, a URL such as rtsp://..., or a camera's device with --format v4l2")
    add("--out", type=Path, metavar="FILE", help="write the film with boxes here, such as out.mp4")
    add("--json", metavar="FILE", help="write the detections here, a line a frame; - = standard output")
    add("--no-video", action="store_true", help="write no film, even with --out")
    add("--every", type=int, default=1, metavar="N", help="ask for every Nth frame only; default: 1")
    add("--start", type=float, default=0.0, metavar="S", help="begin at this second")
    add("--end", type=float, metavar="S", help="end at this second")
    add("--format", metavar="NAME", help="FFmpeg's name of the input's format")
    add("--in-flight", type=int, default=4, metavar="N", help="frames worked on at once; default: 4")
    add(
        "--live",
        action=argparse.BooleanOptionalAction,
        help="leave out frames that come while the server is busy; default: for devices and for streams that do not "
        "wait, such as rtsp://",
    )
    add(
        "--read-timeout",
        type=float,
        default=READ_TIMEOUT,
        metavar="S",
        help="a stream that sends nothing for so many seconds has ended; default: %(default)g",
    )
    add("--codec", metavar="NAME", help="FFmpeg's encoder for --out; default: libx264, for .webm vp9")
    add_server_options(parser)
    return parser


def _run(options: argparse.Namespace) -> int:
    out = None if options.no_video else options.out
    _check(options, out)
    _keep_freed_memory()
    with (
        opened(
            options.input,
            format=options.format,
            start=options.start,
            end=options.end,
            live=options.live,
            read_timeout=options.read_timeout,
        ) as film,
        SSDClient(**client_options(options), max_in_flight=1) as client,
    ):
        client.model_config()
        writer = None
        if out is not None:
            writer = Writer(out, film, options.codec)
        try:
            return _detect(options, film, client, writer, out)
        finally:
            if writer is not None:
                writer.discard()  # nothing is left of it if it was closed


def _keep_freed_memory() -> None:
    """Have the next frame use the memory of the last one: a tenth of the time goes into handing it back and forth."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        glibc = ctypes.CDLL(None)
        glibc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        glibc.mallopt(_M_TRIM_THRESHOLD, 256 << 20)


@contextlib.contextmanager
def _stopping() -> Iterator[threading.Event]:
    """What Ctrl-C and SIGTERM set, so a frame is written whole or not at all; a second one ends at once."""
    stop = threading.Event()

    def handle(_number: int, _frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _detect(options: argparse.Namespace, film: Film, client: SSDClient, writer: Writer | None, out: Path | None) -> int:
    count = found = failed = 0
    last, status, stopped = options.start, 0, ""
    with _lines(options.json) as write_line, _progress(film.seconds) as advance, _stopping() as stop:
        frames = detect(
            film,
            client,
            every=options.every,
            in_flight=options.in_flight,
            draw=writer is not None,
            score_threshold=options.score_threshold,
            iou_threshold=options.iou_threshold,
        )
        try:
            for frame in frames:
                if stop.is_set():
                    stopped = "stopped by Ctrl-C or SIGTERM"
                    break
                if frame.asked:
                    write_line(_line(frame))
                    failed += bool(frame.error)
                    found += len(frame.detections or ())
                if writer is not None:
                    writer.write(frame)
                count, last = count + 1, frame.seconds
                advance(frame.seconds - options.start)
        except InvalidInputError:
            raise
        except SSDClientError as error:
            if not count:
                raise
            stopped, status = str(error), 2
        finally:
            frames.close()  # type: ignore[attr-defined]
    if writer is not None:
        writer.close()
    if not count and not status:
        raise InvalidInputError(
            f"{without_password(options.input)} has no frame {_between(options)}"
            + "".join(f"\n{line}" for line in film.damage),
            fix="check the film, --start and --end",
        )
    where = escaped(f", film in {out}") if out else ""
    print(f"{count} frames, {found} detections{where}", file=sys.stderr)
    if stopped:
        print(f"ended at {last:.2f} s: {stopped}", file=sys.stderr)
    if film.left_out:
        print(f"{film.left_out} frames were left out: they came while the server was busy", file=sys.stderr)
    if failed:
        print(f"warning: the server failed for {failed} frames; the lines of --json say why", file=sys.stderr)
    for line in film.damage:
        print(escaped(f"warning: {without_password(options.input)}: {line}"), file=sys.stderr)
    return status or (1 if failed or film.damage else 0)


def _between(options: argparse.Namespace) -> str:
    return f"between {options.start:g} s and {'its end' if options.end is None else f'{options.end:g} s'}"


def _check(options: argparse.Namespace, out: Path | None) -> None:
    for name in ("every", "in_flight"):
        if getattr(options, name) < 1:
            raise InvalidInputError(f"--{name.replace('_', '-')} is {getattr(options, name)}", fix="give at least 1")
    if not options.start >= 0 or (options.end is not None and not options.end > options.start):
        raise InvalidInputError(
            f"--start is {options.start:g}, --end is {options.end}", fix="give seconds from 0, the end after the start"
        )
    if not 0 < options.read_timeout < float("inf"):
        raise InvalidInputError(f"--read-timeout is {options.read_timeout:g}", fix="give seconds, more than 0")
    if out is None and options.json is None:
        raise InvalidInputError("there is nothing to write", fix="give --out FILE, --json FILE or both")
    if out is not None and options.json not in (None, "-") and out.resolve() == Path(options.json).resolve():
        raise InvalidInputError(f"--out and --json are both {out}", fix="give two files")
    if out is not None and out.exists() and not out.is_file():
        raise InvalidInputError(f"--out {out} is no file", fix="give another path; --no-video writes no film")
    source = Path(options.input).resolve()
    for name, path in (("--out", out), ("--json", options.json)):
        if path not in (None, "-") and Path(path).resolve() == source:
            raise InvalidInputError(f"{name} {path} is the film itself", fix="give another file")


def _line(frame: Frame) -> str:
    width, height = frame.detections.image_size if frame.detections is not None else (None, None)
    detections = [] if frame.detections is None else frame.detections.to_dicts()
    record: dict[str, Any] = {"frame": frame.index, "seconds": round(frame.seconds, 6), "width": width}
    record |= {"height": height, "detections": detections, "error": frame.error}
    return json.dumps(record, ensure_ascii=False)


@contextlib.contextmanager
def _lines(target: str | None) -> Iterator[Callable[[str], object]]:
    """Takes lines for standard output, or for a file that appears at the end."""
    if target is None:
        yield lambda line: None
        return
    if target == "-":
        yield lambda line: print(line, flush=True)
        return
    try:
        with replacing(Path(target)) as stream:
            yield lambda line: stream.write(f"{line}\n".encode("utf-8", "surrogateescape"))
    except SSDClientError:  # one of them is an OSError, too
        raise
    except OSError as error:
        raise InvalidInputError(f"--json {target} cannot be written: {error.strerror or error}") from None


@contextlib.contextmanager
def _progress(seconds: float | None) -> Iterator[Callable[[float], None]]:
    """On a terminal a bar with the time left; takes the seconds of the film that are done."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
    except ImportError:
        yield lambda done: None
        return
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    columns = (TextColumn("{task.completed:.1f} s of film"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("film", total=seconds)
        yield lambda done: bar.update(task, completed=done)
