"""One running server with one model, and what a point of load on it needs: pictures, what they must give, a journal.

with start_bench(repository, "shapes", images, journal) as bench:
    record = bench.point("concurrency", Load(concurrency=4), seconds=2.0)
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build.errors import DataError, ServeError
from perf import answers
from perf.analyzer import run, write_input
from perf.direct import served_version, thresholds
from perf.journal import Journal
from perf.load import Load, PerfError
from perf.mlperf.runs import IN_MEMORY
from perf.resources import Sampler

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from ssd_client.config import ModelConfig

    from build.gate.datasets import Pictures
    from build.serve import TritonServer
    from build.spec import Spec
    from perf.settings import Settings

PICTURES = 16  # the load's variety; perf_analyzer sends them in turn


@dataclass(frozen=True)
class Bench:
    """A model that is served on this machine, ready to be loaded.

    Attributes:
        server: the running server.
        model: name on it.
        config: the model's, as the server tells it.
        images: real pictures, UINT8 [H,W,3], at the model's input size.
        expected: what the served file answers to them in this process.
        data: perf_analyzer's input of them.
        journal: where what is measured is kept.
        late_ms: a checked answer that takes longer counts as late; None = none does.
    """

    server: TritonServer
    model: str
    config: ModelConfig
    images: Sequence[NDArray[np.uint8]]
    expected: answers.Expected
    data: Path
    journal: Journal
    late_ms: float | None = None

    @property
    def precision(self) -> str:
        """Of the served model."""
        return self.config.precision

    def point(
        self,
        series: str,
        load: Load,
        *,
        seconds: float,
        repeat: int = 0,
        check: bool = True,
        retries: int = 1,
        **key: Any,
    ) -> dict[str, Any]:
        """Measures one load, or takes what the journal has of it.

        Args:
            series: what the point belongs to.
            load: what to put on the server.
            seconds: of measurement.
            repeat: number of the repeat.
            check: whether answers are checked meanwhile. Not where a figure must not be touched by what that costs.
            retries: how often a point that swings is measured again, each time twice as long.
            key: what else tells this measurement from others.

        Returns:
            `load`; `point`: `Point.as_dict()` without every single latency; `answers`: as `AnswerCheck.result`, None
            where they were not checked; `resources`.

        Raises:
            PerfError: it could not be measured.
            ServeError: because the server is gone.
        """
        whole = {"series": series, "precision": self.precision, "load": load.as_dict(), "repeat": repeat, **key}
        return self.journal.measure({**whole, "seconds": seconds}, lambda: self._measure(load, seconds, check, retries))

    def _measure(self, load: Load, seconds: float, check: bool, retries: int) -> dict[str, Any]:
        url = self.server.http_url if load.protocol == "http" else self.server.grpc_url
        checking = answers.AnswerCheck(
            self.server.grpc_url,
            self.model,
            self.images,
            self.expected,
            clients=load.concurrency or max(1, round((load.rate or 0) / 100)),
            late_ms=self.late_ms,
        )
        try:
            before = self.server.images(self.model)
            with Sampler(self.server.pid) as sampler, checking if check else contextlib.nullcontext():
                point = run(url, self.model, self.data, load, seconds=seconds, retries=retries)
            served = self.server.images(self.model) - before
        except (PerfError, OSError) as error:
            self.server.check()  # the better explanation where it is the server that failed
            if isinstance(error, OSError):
                raise ServeError(
                    f"the server did not answer in time: {error}", fix="see what else runs there"
                ) from error
            raise
        figures = point.as_dict()
        del figures["latencies_ms"], figures["sent_s"]
        return {
            "load": load.as_dict(),
            "point": figures,
            "answers": checking.result if check else None,
            "resources": sampler.result(served),
        }


@contextlib.contextmanager
def start_bench(
    repository: Path,
    model: str,
    images: Sequence[NDArray[np.uint8]],
    journal: Journal,
    *,
    late_ms: float | None = None,
) -> Iterator[Bench]:
    """Starts a server on `repository`, with a Bench of its `model`, and stops it at the end.

    Args:
        repository: with one published model or more.
        model: one of them.
        images: UINT8 [H,W,3], at its input size; the first 16 count.
        journal: of the run.
        late_ms: as for `Bench`.

    Raises:
        ServeError: the server does not come up, or the model is not served, or is none of this project's.
    """
    from ssd_client import SSDClient, SSDClientError

    from build.serve import TritonServer

    images = images[:PICTURES]
    with TritonServer(repository) as server, tempfile.TemporaryDirectory(prefix="ssd-bench-") as folder:
        try:
            with SSDClient(server.grpc_url, model=model) as client:
                config = client.model_config()
        except SSDClientError as error:
            raise ServeError(f"{model} cannot be loaded with pictures: {error}") from None
        expected = answers.expected_answers(served_version(server, model), config, images)
        data = write_input(Path(folder) / "input.json", images, thresholds(config))
        yield Bench(server, model, config, images, expected, data, journal, late_ms)


def load_pictures(spec: Spec, settings: Settings, artifacts: Path) -> tuple[Sequence[NDArray[np.uint8]], Pictures]:
    """Some real pictures at the model's input size for perf_analyzer, and as files as many as LoadGen needs.

    Raises:
        DataError: there are none.
    """
    from ssd_client.preprocess import SUFFIXES

    from build.gate import datasets

    if settings.images:
        paths = sorted(path for path in Path(settings.images).glob("*") if path.suffix.lower() in SUFFIXES)
        if not paths:
            raise DataError(
                f"{settings.images} holds no pictures",
                why="there is no such folder, or nothing in it ends in " + ", ".join(SUFFIXES),
                fix="name a folder with some: invoke perf --images FOLDER",
            )
        images = [datasets.load(path, spec.input)[0] for path in paths[:PICTURES]]
        return images, datasets.Pictures(settings.images, tuple(paths))
    if not spec.data.held_out:
        raise DataError(
            f"{spec.path}: [data] names no held-out pictures, so there is nothing real to send",
            fix="name a folder with some: invoke perf --images FOLDER",
        )
    loadgen = bool(settings.scenarios or settings.size.scenarios)
    count = spec.data.held_out_count if settings.accuracy else IN_MEMORY if loadgen else PICTURES
    data = replace(spec.data, held_out_count=min(count, spec.data.held_out_count))
    pictures = datasets.held_out(replace(spec, data=data), artifacts / "datasets")
    return [datasets.load(path, spec.input)[0] for path in pictures.paths[:PICTURES]], pictures
