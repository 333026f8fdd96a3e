"""Detections of a great many pictures as Parquet, with Daft: on this machine, or on a Ray cluster by the same lines.

It needs Daft, and Ray for a cluster (`pip install './client[batch]'`). Pictures are worked on in chunks. The rows of
a chunk appear whole or not at all, and a run that is started again leaves out every picture that has a row.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from threading import Lock
from typing import Any

from PIL import Image

from .client import SSDClient
from .config import ModelConfig
from .exceptions import ImageError, InferenceError, InvalidInputError, SSDClientError
from .preprocess import MAX_PIXELS, SUFFIXES, load_image

_PART = ".part-"
_TRIES = 3  # for a chunk, as long as the server answers: a worker of a cluster may die
_RAY_TIMEOUT = 5.0  # seconds
_ROWS = 64  # handed to a worker at once


class BatchError(SSDClientError):
    """Pictures cannot be listed, rows cannot be written, or the engine failed."""


@dataclass(frozen=True)
class Job:
    """What is asked of every picture.

    Attributes:
        client: arguments of `SSDClient`; they travel to the workers.
        score_threshold, iou_threshold: see `SSDClient.detect`.
        max_pixels: refuse pictures with more.
        in_flight: requests of each worker at once, and as many pictures in its memory.
        workers: of the engine.
        chunk: pictures between two points from which a run can be resumed.
    """

    client: Mapping[str, Any]
    score_threshold: float | None = None
    iou_threshold: float | None = None
    max_pixels: int = MAX_PIXELS
    in_flight: int = 4
    workers: int = 1
    chunk: int = 5000

    def __post_init__(self) -> None:
        for name in ("max_pixels", "in_flight", "workers", "chunk"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name} is {getattr(self, name)}", fix="give at least 1")


class Worker:
    """One of the engine's workers: a client, and threads that decode and ask.

    Args:
        job: what is asked.
    """

    def __init__(self, job: Job) -> None:
        Image.MAX_IMAGE_PIXELS = None  # the limit is max_pixels
        self._job = job
        self._client = SSDClient(**job.client, max_in_flight=1, max_pixels=job.max_pixels)
        self._threads = ThreadPoolExecutor(job.in_flight, "ssd_batch")

    def rows(self, paths: Sequence[str], contents: Sequence[bytes | None]) -> list[dict[str, Any]]:
        """One row for each picture: width, height, boxes, scores, labels, error.

        Args:
            paths: of the pictures; those on this machine are read from there.
            contents: of the others; None = it could not be read.

        Raises:
            SSDClientError: the server went away or cannot serve this model.
        """
        return list(self._threads.map(self._row, paths, contents))

    def _row(self, path: str, content: bytes | None) -> dict[str, Any]:
        row: dict[str, Any] = dict.fromkeys(("width", "height", "boxes", "scores", "labels"))
        try:
            if "://" in path and content is None:
                raise _unreadable(path)
            image = load_image(_named(path) if content is None else content, max_pixels=self._job.max_pixels)
            row |= {"width": image.width, "height": image.height}
            job = self._job
            found = self._client.detect(image, score_threshold=job.score_threshold, iou_threshold=job.iou_threshold)
        except (ImageError, InferenceError) as error:
            return {**row, "error": str(error)}
        boxes, scores = found.boxes.tolist(), found.scores.tolist()
        return {**row, "boxes": boxes, "scores": scores, "labels": list(found.labels), "error": ""}

    def close(self) -> None:
        """End the threads and the connection: at the interpreter's end they would meet the engine's own threads."""
        self._threads.shutdown()
        self._client.close()


def _unreadable(path: str) -> ImageError:
    return ImageError(f"{path} cannot be read", fix="check that it is there, and that you may read it")


def _text(name: str) -> str:
    """A file's name as Parquet can hold it: bytes that are not UTF-8 become \\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _named(text: str) -> str:
    """The file that `_text` means."""
    if os.path.lexists(text):
        return text
    return os.fsdecode(re.sub(rb"\\x([89a-f][0-9a-f])", lambda match: bytes.fromhex(match[1].decode()), text.encode()))


_workers: dict[str, Worker] = {}
_making = Lock()


def worker_of(job: Job) -> Worker:
    """This process's worker: however many the engine makes, they share its client, its threads and its limit."""
    with _making:
        key = repr(job)
        if key not in _workers:
            _workers[key] = Worker(job)
        return _workers[key]


def require(ray: str | None = None) -> Any:
    """Daft, with its engine chosen.

    Args:
        ray: address of a Ray cluster, such as `auto` or `10.0.0.1:6379`; None = this machine alone.

    Raises:
        BatchError: a package is missing, or there is no cluster.
    """
    for name, value in (("DAFT_PROGRESS_BAR", "0"), ("DAFT_ANALYTICS_ENABLED", "0"), ("DO_NOT_TRACK", "1")):
        os.environ.setdefault(name, value)
    for name in ("aws_config", "daft_local_execution"):  # what they log is raised, too, and told once
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        import daft

        if ray is not None:
            import ray as cluster
    except ImportError as error:
        raise BatchError(
            f"this needs {error.name}, which is not installed", fix="pip install './client[batch]'"
        ) from None
    daft.set_planning_config(default_io_config=daft.io.IOConfig(s3=daft.io.S3Config(**_store())))
    if ray is None:
        daft.set_runner_native()
        return daft
    try:
        if not cluster.is_initialized():
            _knock(ray)
            package = str(Path(__file__).parent)  # the workers of a cluster may not have it
            cluster.init(ray, runtime_env={"py_modules": [package]}, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise BatchError(
            f"no Ray cluster at {ray}: {error}", fix="start one: ray start --head; or leave --ray out"
        ) from None
    daft.set_runner_ray(noop_if_initialized=True)
    return daft


def _knock(ray: str) -> None:
    """Ray itself waits for minutes for a cluster that is not there."""
    match = re.fullmatch(r"(?:ray://)?\[?([^/\]]+)\]?:(\d{1,5})", ray)
    if match is not None:
        try:
            socket.create_connection((match[1], int(match[2])), _RAY_TIMEOUT).close()
        except (OSError, OverflowError) as error:
            raise ConnectionError(f"it does not answer: {getattr(error, 'strerror', None) or error}") from None


def _store() -> dict[str, Any]:
    """How a store is asked; where it is and who asks comes from AWS's own variables and files."""
    settings: dict[str, Any] = {"connect_timeout_ms": 5_000, "num_tries": 5}
    regions = ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE", "AWS_CONFIG_FILE")
    if "AWS_ENDPOINT_URL" in os.environ and not any(name in os.environ for name in regions):
        settings["region_name"] = "us-east-1"  # what other stores than Amazon's expect
    return settings


def _in_store(daft: Any, pattern: str) -> list[str]:
    """What matches a URL; of a folder all its pictures."""
    folder = not set(pattern) & set("*?[{") and not pattern.lower().endswith(SUFFIXES)
    try:
        listed = (
            daft.from_glob_path(f"{pattern.rstrip('/')}/**" if folder else pattern).select("path").to_pydict()["path"]
        )
    except FileNotFoundError:
        return []
    except Exception as error:  # Daft raises many kinds for what a store answers
        said = str(error)
        if "Need at least 1 MicroPartition" in said:  # how Daft 0.7 says that nothing matches
            return []
        if "Unable to load credentials" in said:
            raise BatchError(
                f"{pattern} cannot be listed: there are no credentials for the store",
                fix="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; for another store than Amazon's "
                "AWS_ENDPOINT_URL, too",
            ) from None
        raise BatchError(
            f"{pattern} cannot be listed: {_last_line(error)}",
            why="the address is wrong, the store does not answer, or you may not read there",
            fix="check AWS_ENDPOINT_URL, AWS_REGION and the rights",
        ) from None
    return [path for path in listed if not folder or path.lower().endswith(SUFFIXES)]


def pictures(daft: Any, patterns: Sequence[str]) -> list[str]:
    """Every picture once, sorted.

    Args:
        daft: from `require`.
        patterns: files, folders, globs, or URLs of them (s3://, https://).

    Raises:
        BatchError: nothing matches, or a place cannot be listed.
    """
    found: set[str] = set()
    for pattern in patterns:
        if "://" in pattern:
            listed = _in_store(daft, pattern)
        elif pattern and Path(pattern).is_dir():
            held = (str(path) for path in Path(pattern).absolute().rglob("*") if path.is_file())
            listed = [_text(path) for path in held if path.lower().endswith(SUFFIXES)]
        else:  # a name may have brackets
            names = [pattern] if Path(pattern).is_file() else glob(pattern, recursive=True)  # noqa: PTH207 - any pattern
            listed = [_text(str(Path(path).absolute())) for path in names if Path(path).is_file()]
        if not listed:
            raise BatchError(
                f"no picture matches {pattern or repr(pattern)}",
                fix="check the pattern; quote it, so the shell keeps it; a [ in a folder's name is [[] in a pattern",
            )
        found.update(listed)
    return sorted(found)


def run(
    daft: Any,
    paths: Sequence[str],
    out: str,
    job: Job,
    told: Callable[[int, int], None] = lambda done, failed: None,
    warn: Callable[[str], None] = lambda text: None,
) -> None:
    """Writes a row for every picture that has none yet.

    Args:
        daft: from `require`.
        paths: from `pictures`.
        out: folder of Parquet files, here or in a store (s3://...).
        job: what is asked.
        told: is called with the numbers of rows and of errors so far, those of earlier runs included.
        warn: is called with what went wrong and is tried again.

    Raises:
        BatchError: `out` has the rows of another model, cannot be written, or the engine failed.
        SSDClientError: the server went away. What is written so far stays, and the next run goes on from there.
    """
    with _held(out), SSDClient(**job.client) as client:
        config = client.model_config()
        blank = Image.new("RGB", (8, 8))  # a wrong threshold is an error of the run, not of every picture
        client.detect(blank, score_threshold=job.score_threshold, iou_threshold=job.iou_threshold)
        done = _done(daft, out, config)
        todo = [path for path in paths if path not in done]
        rows, failed = len(paths) - len(todo), sum(done[path] for path in paths if path in done)
        told(rows, failed)
        try:
            for start in range(0, len(todo), job.chunk):
                chunk = todo[start : start + job.chunk]
                failed += _write(daft, chunk, out, job, config, client, warn)
                rows += len(chunk)
                told(rows, failed)
        finally:
            with _making:
                while _workers:
                    _workers.popitem()[1].close()


def _write(
    daft: Any,
    chunk: Sequence[str],
    out: str,
    job: Job,
    config: ModelConfig,
    client: SSDClient,
    warn: Callable[[str], None],
) -> int:
    """The rows of one chunk; how many of them are errors."""
    failed, frame = 0, None
    for last in (False,) * (_TRIES - 1) + (True,):
        try:
            # Collected first: only whole chunks are written, each once.
            frame = _frame(daft, chunk, job, config).collect() if frame is None else frame
            if client.model_config(refresh=True) != config:
                raise BatchError(
                    f"model {config.name!r} was replaced while pictures were worked on",
                    fix="start again with another --out: one folder holds the rows of one model",
                )
            told = frame.select("path", "error").to_pydict()
            if all(
                "://" in path and error == str(_unreadable(path)) for path, error in zip(*told.values(), strict=True)
            ):
                raise BatchError(
                    f"none of {len(chunk)} pictures can be read, {chunk[0]} among them",
                    why="the store can be listed, but you may not read there, or it does not answer any more",
                    fix="check your credentials (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY), and run this again",
                )
            with _target(out) as place:
                frame.write_parquet(place)
            return failed + sum(bool(error) for error in told["error"])
        except SSDClientError:
            raise
        except Exception as error:  # Daft and Ray raise many kinds
            client.model_config(refresh=True)  # raises if it is the server
            if "://" in out:  # a store may have kept what it said had failed
                there = _done(daft, out, config)
                failed += sum(there.get(path, False) for path in chunk)
                rest = [path for path in chunk if path not in there]
                if not rest:
                    return failed
                chunk, frame = rest, frame if len(rest) == len(chunk) else None
            if last:
                raise BatchError(
                    f"a chunk of {len(chunk)} pictures failed {_TRIES} times: {_last_line(error)}"
                ) from error
            warn(f"a chunk of {len(chunk)} pictures is tried again: {_last_line(error)}")
    raise AssertionError("unreachable")


def _last_line(error: Exception) -> str:
    """The innermost cause, which Daft's errors end with."""
    return (str(error).strip().splitlines() or [repr(error)])[-1].strip()


def _frame(daft: Any, chunk: Sequence[str], job: Job, config: ModelConfig) -> Any:
    """The rows of a chunk, as Daft computes them."""
    kind = daft.DataType
    record = kind.struct(
        {
            "width": kind.int32(),
            "height": kind.int32(),
            "boxes": kind.list(kind.fixed_size_list(kind.float32(), 4)),
            "scores": kind.list(kind.float32()),
            "labels": kind.list(kind.string()),
            "error": kind.string(),
        }
    )

    # A single worker is threads of this process; several are processes of their own.
    engine = {"use_process": False} if job.workers == 1 else {"max_concurrency": job.workers, "use_process": True}

    @daft.cls(**engine)
    class Detector:
        def __init__(self, job: Job) -> None:
            self._worker = worker_of(job)

        @daft.method.batch(return_dtype=record, unnest=True, batch_size=_ROWS)  # type: ignore[untyped-decorator]
        def rows(self, paths: Any, contents: Any) -> list[dict[str, Any]]:
            return self._worker.rows(paths.to_pylist(), contents.to_pylist())

    frame = daft.from_pydict({"path": list(chunk)})
    if len(chunk) > _ROWS and job.workers > 1:
        frame = frame.into_partitions(2 * job.workers)
    path = daft.col("path")
    if any("://" in path for path in chunk):
        frame = frame.with_column("content", path.download(on_error="null"))
    else:
        frame = frame.with_column("content", daft.lit(None).cast(kind.binary()))
    frame = frame.select(path, Detector(job).rows(path, daft.col("content")))
    model, manifest = daft.lit(config.name), daft.lit(config.manifest_sha256)
    return frame.with_columns({"model": model, "manifest_sha256": manifest})


def _done(daft: Any, out: str, config: ModelConfig) -> dict[str, bool]:
    """The pictures that have a row, and whether it is an error."""
    pattern = f"{out.rstrip('/')}/*.parquet"
    try:
        if "://" not in out and not any(Path(out).glob("*.parquet")):
            return {}
        columns = ("path", "error", "model", "manifest_sha256")
        held = daft.read_parquet(pattern).select(*columns).to_pydict()
    except FileNotFoundError:
        return {}
    except Exception as error:  # Daft raises many kinds
        raise BatchError(f"the rows in {out} cannot be read: {error}", fix="give another --out") from None
    others = set(zip(held["model"], held["manifest_sha256"], strict=True)) - {(config.name, config.manifest_sha256)}
    if others:
        name, manifest = sorted(others)[0]
        raise BatchError(
            f"{out} has rows of model {name!r} (manifest {manifest[:12]}), the server has {config.name!r} "
            f"(manifest {config.manifest_sha256[:12]})",
            fix="give another --out: one folder holds the rows of one model",
        )
    return {path: bool(error) for path, error in zip(held["path"], held["error"], strict=True)}


@contextlib.contextmanager
def _held(out: str) -> Iterator[None]:
    """Holds a folder on this machine against a second run, and clears what an interrupted one left."""
    if "://" in out:
        yield
        return
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a")
    except OSError as error:
        raise BatchError(f"{out} cannot be written: {error.strerror or error}", fix="give a folder") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BatchError(f"another run writes to {out}", fix="wait for it, or give another --out") from None
        for left in folder.glob(f"{_PART}*"):
            shutil.rmtree(left, ignore_errors=True)
        yield


@contextlib.contextmanager
def _target(out: str) -> Iterator[str]:
    """Where Daft writes a chunk. On this machine it is moved to its place when whole; stores do that themselves."""
    if "://" in out:
        yield out
        return
    part = Path(out).absolute() / f"{_PART}{uuid.uuid4().hex[:8]}"
    try:
        yield str(part)
        for file in sorted(part.glob("*.parquet")):
            file.replace(part.parent / file.name)
    finally:
        shutil.rmtree(part, ignore_errors=True)
