"""The command line: `python -m ssd_client IMAGE|FOLDER... --model NAME`, for pictures on disk.

Exit status: 0 all pictures done, 1 some failed (each is named), 2 nothing could be done or the server went away.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from PIL import Image

from .budget import PixelBudget
from .client import SSDClient
from .config import ModelConfig
from .detections import Detections
from .exceptions import ImageError, InferenceError, InvalidInputError, SSDClientError
from .options import add_server_options, client_options
from .output import replacing
from .preprocess import MAX_PIXELS, SUFFIXES, out_of_memory
from .text import escaped

_IN_FLIGHT = 4
_LINE = "\n"
# What JSON leaves as it is, and UTF-8 or a terminal does not take.
_NOT_PLAIN = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")

_EPILOG = """\
--json writes one object:
  model, server        what was asked
  images               [{id, file_name, width, height}], pictures that were done
  categories           [{id, name}]
  annotations          [{image_id, category_id, bbox: [x, y, width, height] in pixels, score}]: COCO results
  failed               [{file_name, error}]

subcommands, with a --help of their own:
  video                frames of a film, a camera or a stream
  batch                a great many pictures, to Parquet

exit status: 0 all pictures done, 1 some failed, 2 nothing could be done or the server went away
"""


@dataclass(frozen=True)
class _Picture:
    """A picture to look at, and where the annotated one goes."""

    path: Path
    target: Path | None


@dataclass(frozen=True)
class _Outcome:
    picture: _Picture
    detections: Detections | None
    error: str = ""


def program() -> NoReturn:
    """The command line as a process."""
    status = main()
    if "daft" in sys.modules:  # without Python's own shutdown, in which Daft's threads crash now and then (SIGSEGV)
        ray: Any = sys.modules.get("ray")
        if ray is not None:
            ray.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; None = those of the process.

    Returns:
        The exit status.
    """
    for stream in (sys.stdout, sys.stderr):  # an encoding without a character must not end the run
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        if arguments[:1] in (["video"], ["batch"]):  # a picture of that name: ./video
            subcommand: Any = import_module(f"{__package__}.{arguments[0]}_cli")
            return int(subcommand.run(arguments[1:]))
        options = _parser().parse_args(arguments)
        Image.MAX_IMAGE_PIXELS = None  # the limit is --max-pixels
        return _run(options)
    except SSDClientError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2
    except OSError as error:  # standard output is a file on a full disk
        print(f"error: the output cannot be written: {error.strerror or error}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ssd_client",
        description="Find objects in pictures with a detector that SSD on Triton serves.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("inputs", nargs="+", type=Path, metavar="IMAGE|FOLDER", help="picture files; folders are searched for them")
    add("--out", type=Path, metavar="DIR", help="write the pictures with boxes on them here, as PNG")
    add("--json", metavar="FILE", help="write the results here; - = standard output")
    add("--batch", type=int, default=8, metavar="N", help="pictures per request, at most the model's; default: 8")
    add("--max-pixels", type=int, default=MAX_PIXELS, metavar="N", help=f"refuse larger files; default: {MAX_PIXELS}")
    add_server_options(parser)
    return parser


def _run(options: argparse.Namespace) -> int:
    if options.batch < 1:
        raise InvalidInputError(f"--batch is {options.batch}", fix="give at least 1")
    server = client_options(options)
    pictures = _plan(options.inputs, options.out)
    if options.json not in (None, "-") and Path(options.json).resolve() in {p.path.resolve() for p in pictures}:
        raise InvalidInputError(f"--json {options.json} is one of the pictures", fix="give another file")
    # Each part below is one request; the parts run side by side.
    with SSDClient(**server, max_in_flight=1, max_pixels=options.max_pixels) as client:
        config = client.model_config()
        options.pixels = PixelBudget(options.max_pixels)
        outcomes: list[_Outcome] = []
        fatal: SSDClientError | None = None

        def work(part: list[_Picture]) -> list[_Outcome]:
            return _process(client, part, options)

        with _progress(len(pictures)) as progress:
            try:
                for part in _side_by_side(work, pictures, min(options.batch, config.max_batch_size)):
                    outcomes += part
                    for outcome in part:
                        if outcome.error:
                            progress.message(f"error: {outcome.error}")
                        elif options.out is None and options.json is None:
                            print(escaped(_line(outcome)))
                    progress.advance(len(part))
            except SSDClientError as error:
                fatal = error
    if options.json is not None:
        _write_json(options.json, _document(options, config, outcomes))
    failed = sum(1 for outcome in outcomes if outcome.error)
    where = f", pictures in {options.out}" if options.out else ""
    count = sum(len(outcome.detections) for outcome in outcomes if outcome.detections is not None)
    where = escaped(where)
    print(f"{len(outcomes) - failed} pictures done, {failed} failed, {count} detections{where}", file=sys.stderr)
    if fatal is not None:
        reason = escaped(str(fatal), keep=_LINE)
        print(f"error: stopped {len(pictures) - len(outcomes)} pictures before the end: {reason}", file=sys.stderr)
        return 2
    return 1 if failed else 0


def _plan(inputs: Sequence[Path], out: Path | None) -> list[_Picture]:
    """Every picture once, with a target that is no input and no other picture's target."""
    targets: dict[Path, Path] = {}  # the file, and its name below --out
    for path in inputs:
        if path.is_dir():
            held = _pictures_in(path)
            if not held:
                _warn(f"no pictures in folder {path}")
            targets.update((file, file.relative_to(path)) for file in held)
        else:
            targets[path] = Path(path.name)
    unique = {path.resolve(): (path, name) for path, name in targets.items()}
    if not unique:
        raise InvalidInputError("no pictures to look at", fix="name picture files, or folders that hold some")
    if out is None:
        return [_Picture(path, None) for path, _ in unique.values()]
    if out.exists() and not out.is_dir():
        raise InvalidInputError(f"--out {out} is a file", fix="give a folder")
    taken = set(unique)
    pictures = []
    for path, name in unique.values():
        target, number = out / name.with_suffix(".png"), 1
        while target.resolve() in taken:
            number += 1
            target = out / name.with_name(f"{name.stem}-{number}.png")
        taken.add(target.resolve())
        pictures.append(_Picture(path, target))
    return pictures


def _pictures_in(folder: Path) -> list[Path]:
    """The files with a picture's name, below the folder; says what else is there and what cannot be looked at."""
    held: list[Path] = []
    others: Counter[str] = Counter()
    for place, _, names in os.walk(folder, onerror=lambda error: _warn(f"{error.filename}: {error.strerror}")):
        for name in names:
            path = Path(place, name)
            if path.suffix.lower() in SUFFIXES and path.is_file():
                held.append(path)
            elif not name.startswith("."):
                others[path.suffix.lower() or "without a suffix"] += 1
    if others:
        kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common(8))
        more = ", ..." if len(others) > 8 else ""
        _warn(f"{others.total()} other files in folder {folder} are left out: {kinds}{more}")
    return sorted(held)


def _warn(text: str) -> None:
    print(f"warning: {escaped(text)}", file=sys.stderr)


def _side_by_side(
    work: Callable[[list[_Picture]], list[_Outcome]], pictures: list[_Picture], size: int
) -> Iterator[list[_Outcome]]:
    """`work` on parts of `size` pictures, a few at once and no more than that in memory, in their order."""
    parts = (pictures[start : start + size] for start in range(0, len(pictures), size))
    with ThreadPoolExecutor(_IN_FLIGHT) as threads:
        running: deque[Future[list[_Outcome]]] = deque(threads.submit(work, part) for part in islice(parts, _IN_FLIGHT))
        try:
            while running:
                done = running.popleft().result()
                running.extend(threads.submit(work, part) for part in islice(parts, 1))
                yield done
        finally:
            for future in running:
                future.cancel()


def _process(client: SSDClient, part: list[_Picture], options: argparse.Namespace) -> list[_Outcome]:
    """Detect, draw and write one part; a picture that fails does not touch the others.

    The client gets paths and opens one picture after the other, so no more than one of a part is in memory.
    """
    thresholds = {"score_threshold": options.score_threshold, "iou_threshold": options.iou_threshold}
    budget: PixelBudget = options.pixels
    try:
        found = client.detect([picture.path for picture in part], **thresholds)
    except (ImageError, InferenceError) as error:
        if len(part) == 1:
            named = "" if isinstance(error, ImageError) else f"{part[0].path}: "
            return [_Outcome(part[0], None, named + _reason(error))]
        return [outcome for picture in part for outcome in _process(client, [picture], options)]
    return [_Outcome(picture, each, _drawn(picture, each, budget)) for picture, each in zip(part, found, strict=True)]


def _reason(error: SSDClientError) -> str:
    """Its text without the place in a list of one."""
    return str(error).removeprefix("picture 0 of the list: ")


def _drawn(picture: _Picture, detections: Detections, pixels: PixelBudget) -> str:
    """Write the picture with its boxes, if it has a target; the error, if there is one."""
    if picture.target is None:
        return ""
    try:
        picture.target.parent.mkdir(parents=True, exist_ok=True)
        with pixels.share() as take, replacing(picture.target) as stream:
            take(detections.image_size[0] * detections.image_size[1])
            detections.draw().save(stream, "PNG")
    except ImageError as error:  # it changed since
        return str(error)
    except OSError as error:
        return f"{picture.target} cannot be written: {error.strerror or error}"
    except MemoryError:
        return str(out_of_memory(picture.path))
    return ""


def _line(outcome: _Outcome) -> str:
    detections = outcome.detections or ()
    boxes = (f"{label} {score:.3f} at {', '.join(f'{v:.1f}' for v in box)}" for box, score, label in detections)
    return f"{outcome.picture.path}: {'; '.join(boxes) or 'nothing'}"


def _document(options: argparse.Namespace, config: ModelConfig, outcomes: list[_Outcome]) -> dict[str, Any]:
    done = [(o.picture.path, o.detections) for o in outcomes if o.detections is not None and not o.error]
    return {
        "model": config.name,
        "server": options.url,
        "images": [
            {"id": k, "file_name": str(path), "width": detections.image_size[0], "height": detections.image_size[1]}
            for k, (path, detections) in enumerate(done, 1)
        ],
        "categories": [{"id": k, "name": label} for k, label in enumerate(config.labels, 1)],
        "annotations": [result for k, (_, detections) in enumerate(done, 1) for result in detections.to_coco(k)],
        "failed": [{"file_name": str(o.picture.path), "error": o.error} for o in outcomes if o.error],
    }


def _write_json(target: str, document: dict[str, Any]) -> None:
    # Of a file name that is no UTF-8 the bytes stay as \udcXX, which JSON can say and UTF-8 cannot.
    text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
    data = _NOT_PLAIN.sub(lambda match: f"\\u{ord(match[0]):04x}", text).encode()
    if target == "-":
        sys.stdout.flush()
        if hasattr(sys.stdout, "buffer"):  # UTF-8, whatever the terminal's encoding
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        else:
            sys.stdout.write(data.decode())
        return
    try:
        with replacing(Path(target)) as stream:
            stream.write(data)
    except OSError as error:
        raise InvalidInputError(f"--json {target} cannot be written: {error.strerror or error}") from None


class _Progress:
    """Prints messages on standard error, and on a terminal the number of pictures done."""

    def __init__(self, total: int) -> None:
        self._total, self._done = total, 0
        self._shown = total > 1 and sys.stderr.isatty()

    def advance(self, count: int) -> None:
        self._done += count
        if self._shown:
            end = "\n" if self._done == self._total else ""
            print(f"\r{self._done}/{self._total}", end=end, file=sys.stderr, flush=True)

    def message(self, text: str) -> None:
        text = escaped(text, keep=_LINE)
        print(f"\r{text}" if self._shown else text, file=sys.stderr)


class _RichProgress(_Progress):
    """The same with rich's bar."""

    def __init__(self, bar: Any, total: int) -> None:
        super().__init__(total)
        self._bar, self._task = bar, bar.add_task("pictures", total=total)

    def advance(self, count: int) -> None:
        self._bar.advance(self._task, count)

    def message(self, text: str) -> None:
        self._bar.console.print(escaped(text, keep=_LINE), markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _progress(total: int) -> Iterator[_Progress]:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        yield _Progress(total)
        return
    if total < 2 or not sys.stderr.isatty():
        yield _Progress(total)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        yield _RichProgress(bar, total)
