"""The command line: `python -m ssd_client IMAGE|FOLDER... --model NAME`, for pictures on disk.

Exit status: 0 all pictures done, 1 some failed (each is named), 2 nothing could be done or the server went away.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

from PIL import Image

from .client import SSDClient
from .config import ModelConfig
from .detections import Detections
from .endpoint import TLS
from .exceptions import ImageError, InferenceError, SSDClientError
from .preprocess import MAX_PIXELS, SUFFIXES, load_image

_IN_FLIGHT = 4

_EPILOG = """\
--json writes one object:
  model, server        what was asked
  images               [{id, file_name, width, height}], pictures that were done
  categories           [{id, name}]
  annotations          [{image_id, category_id, bbox: [x, y, width, height] in pixels, score}]: COCO results
  failed               [{file_name, error}]

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


class _UsageError(Exception):
    """Something on the command line that argparse cannot see."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; None = those of the process.

    Returns:
        The exit status.
    """
    options = _parser().parse_args(argv)
    Image.MAX_IMAGE_PIXELS = None  # the limit is --max-pixels
    try:
        return _run(options)
    except (SSDClientError, _UsageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our output has seen enough
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
    add("--model", required=True, metavar="NAME", help="the model's name on the server")
    add(
        "--url",
        default="localhost",
        metavar="HOST[:PORT]",
        help="default: localhost, port 8001 (grpc) or 8000 (http)",
    )
    add("--protocol", choices=("grpc", "http"), default="grpc", help="default: grpc")
    add("--out", type=Path, metavar="DIR", help="write the pictures with boxes on them here, as PNG")
    add("--json", metavar="FILE", help="write the results here; - = standard output")
    add("--score-threshold", type=float, metavar="T", help="keep scores above this, 0..1; default: the model's own")
    add("--iou-threshold", type=float, metavar="T", help="overlap that suppresses, 0..1; default: the model's own")
    add("--batch", type=int, default=8, metavar="N", help="pictures per request, at most the model's; default: 8")
    add("--shared-memory", action="store_true", help="hand pictures over in shared memory (server on this machine)")
    add("--timeout", type=float, default=30.0, metavar="S", help="seconds for a request with its retries; default: 30")
    add("--retries", type=int, default=3, metavar="N", help="while the server is unavailable; default: 3")
    add("--max-pixels", type=int, default=MAX_PIXELS, metavar="N", help=f"refuse larger files; default: {MAX_PIXELS}")
    add("--tls", action="store_true", help="encrypt; the system's authorities are trusted unless --tls-ca")
    add("--tls-ca", type=Path, metavar="PEM", help="authorities to trust (implies --tls)")
    add("--tls-cert", type=Path, metavar="PEM", help="this client's certificate (implies --tls)")
    add("--tls-key", type=Path, metavar="PEM", help="its private key")
    return parser


def _run(options: argparse.Namespace) -> int:
    if options.batch < 1:
        raise _UsageError(f"--batch is {options.batch}\nwhat to do: give at least 1")
    tls = None
    if options.tls or options.tls_ca or options.tls_cert or options.tls_key:
        tls = TLS(options.tls_ca, options.tls_cert, options.tls_key)
    pictures = _plan(options.inputs, options.out)
    if options.json not in (None, "-") and Path(options.json).resolve() in {p.path.resolve() for p in pictures}:
        raise _UsageError(f"--json {options.json} is one of the pictures\nwhat to do: give another file")
    with SSDClient(
        options.url,
        model=options.model,
        protocol=options.protocol,
        shared_memory="system" if options.shared_memory else None,
        timeout=options.timeout,
        retries=options.retries,
        ssl=tls,
        max_in_flight=1,  # each part below is one request; the parts run side by side
        max_pixels=options.max_pixels,
    ) as client:
        config = client.model_config()
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
                            print(_line(outcome))
                    progress.advance(len(part))
            except SSDClientError as error:
                fatal = error
    if options.json is not None:
        _write_json(options.json, _document(options, config, outcomes))
    failed = sum(1 for outcome in outcomes if outcome.error)
    where = f", pictures in {options.out}" if options.out else ""
    count = sum(len(outcome.detections) for outcome in outcomes if outcome.detections is not None)
    print(f"{len(outcomes) - failed} pictures done, {failed} failed, {count} detections{where}", file=sys.stderr)
    if fatal is not None:
        print(f"error: stopped {len(pictures) - len(outcomes)} pictures before the end: {fatal}", file=sys.stderr)
        return 2
    return 1 if failed else 0


def _plan(inputs: Sequence[Path], out: Path | None) -> list[_Picture]:
    """Every picture once, with a target that is no input and no other picture's target."""
    targets: dict[Path, Path] = {}  # the file, and its name below --out
    for path in inputs:
        if path.is_dir():
            held = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
            if not held:
                print(f"warning: no pictures in folder {path}", file=sys.stderr)
            targets.update((file, file.relative_to(path)) for file in held)
        else:
            targets[path] = Path(path.name)
    unique = {path.resolve(): (path, name) for path, name in targets.items()}
    if not unique:
        raise _UsageError("no pictures to look at\nwhat to do: name picture files, or folders that hold some")
    if out is None:
        return [_Picture(path, None) for path, _ in unique.values()]
    if out.exists() and not out.is_dir():
        raise _UsageError(f"--out {out} is a file\nwhat to do: give a folder")
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
    """Read, detect, draw and write one part; a picture that fails does not touch the others."""
    images, errors = {}, {}
    for picture in part:
        try:
            images[picture] = load_image(picture.path, max_pixels=options.max_pixels)
        except ImageError as error:
            errors[picture] = str(error)
    results: dict[_Picture, Detections] = {}
    if images:
        try:
            detected = client.detect(
                list(images.values()), score_threshold=options.score_threshold, iou_threshold=options.iou_threshold
            )
            results = dict(zip(images, detected, strict=True))
        except InferenceError as error:
            errors.update({picture: f"{picture.path}: {error}" for picture in images})
    for picture, detections in results.items():
        if picture.target is not None:
            try:
                picture.target.parent.mkdir(parents=True, exist_ok=True)
                annotated = detections.draw(images[picture])
                with _replacing(picture.target) as stream:
                    annotated.save(stream, "PNG")
            except OSError as error:
                errors[picture] = f"{picture.target} cannot be written: {error.strerror or error}"
    return [_Outcome(picture, results.get(picture), errors.get(picture, "")) for picture in part]


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
    text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
    if target == "-":
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    try:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        with _replacing(Path(target)) as stream:
            stream.write(text.encode("utf-8", "surrogateescape"))
    except OSError as error:
        raise _UsageError(f"--json {target} cannot be written: {error.strerror or error}") from None


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that appears at `path` whole or not at all."""
    part = path.with_name(f".{path.name[:50]}.{uuid.uuid4().hex[:8]}")
    try:
        with part.open("xb") as stream:
            yield stream
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


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
        print(f"\r{text}" if self._shown else text, file=sys.stderr)


class _RichProgress(_Progress):
    """The same with rich's bar."""

    def __init__(self, bar: Any, total: int) -> None:
        super().__init__(total)
        self._bar, self._task = bar, bar.add_task("pictures", total=total)

    def advance(self, count: int) -> None:
        self._bar.advance(self._task, count)

    def message(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)


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
