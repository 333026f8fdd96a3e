"""One running server with one model, and what a point of load on it needs: pictures and a journal."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build.errors import DataError, ServeError
from perf.analyzer import run, write_input
from perf.direct import thresholds
from perf.journal import Journal
from perf.load import Load, PerfError
from perf.mlperf.child import IN_MEMORY

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
        data: perf_analyzer's input of them.
        journal: where what is measured is kept.
    """

    server: TritonServer
    model: str
    config: ModelConfig
    images: Sequence[NDArray[np.uint8]]
    data: Path
    journal: Journal

    @property
    def precision(self) -> str:
        """Of the served model."""
        return self.config.precision

    def key(self, series: str, **more: Any) -> dict[str, Any]:
        """Of a measurement in the journal; those of another model or server are others."""
        served = f"{self.config.manifest_sha256[:12]} on tritonserver {self.server.version}"
        return {"series": series, "precision": self.precision, "served": served, **more}

    def url(self, protocol: str) -> str:
        """`host:port` of the endpoint that belongs to a protocol."""
        return self.server.http_url if protocol == "http" else self.server.grpc_url

    def point(self, series: str, load: Load, *, seconds: float, repeat: int = 0) -> dict[str, Any]:
        """Measures one load, or takes what the journal has of it.

        Args:
            series: what the point belongs to.
            load: what to put on the server.
            seconds: of measurement.
            repeat: number of the repeat.

        Returns:
            `load`; `point`: as `Point`; `resources` of the server with the model's own processes: `cores` (CPU seconds
            per second, by the kernel's own count), `images_per_core` (None where it used none) and `rss_mib`.

        Raises:
            PerfError: it could not be measured.
            ServeError: because the server is gone.
        """
        key = self.key(series, load=asdict(load), repeat=repeat, seconds=seconds)
        return self.journal.measure(key, lambda: self._measure(load, seconds))

    def _measure(self, load: Load, seconds: float) -> dict[str, Any]:
        try:
            started, cpu, images = time.monotonic(), self._used()[0], self.server.images(self.model)
            point = run(self.url(load.protocol), self.model, self.data, load, seconds=seconds)
            images = self.server.images(self.model) - images
            after, rss = self._used()
        except (PerfError, OSError) as error:
            self.server.check()  # the better explanation where it is the server that failed
            if isinstance(error, PerfError):
                raise
            raise ServeError(f"the server did not answer in time: {error}", fix="see what else runs there") from error
        cores = (after - cpu) / (time.monotonic() - started)
        usage = {"cores": cores, "images_per_core": images / (after - cpu) if after > cpu else None, "rss_mib": rss}
        return {"load": asdict(load), "point": asdict(point), "resources": usage}

    def _used(self) -> tuple[float, float]:
        """CPU seconds so far and MiB now of the server's processes; a process that is gone counts as nothing."""
        import psutil

        seconds, mib = 0.0, 0.0
        with contextlib.suppress(psutil.Error):
            server = psutil.Process(self.server.pid)
            for process in (server, *server.children(recursive=True)):
                seconds += sum(process.cpu_times()[:2])
                mib += process.memory_info().rss / 2**20
        return seconds, mib


@contextlib.contextmanager
def start_bench(repository: Path, model: str, images: Sequence[NDArray[np.uint8]], journal: Journal) -> Iterator[Bench]:
    """Starts a server on `repository`, with a Bench of its `model`, and stops it at the end.

    Args:
        repository: with one published model or more.
        model: one of them.
        images: UINT8 [H,W,3], at its input size; the first 16 count.
        journal: of the run.

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
        data = write_input(Path(folder) / "input.json", images, thresholds(config))
        yield Bench(server, model, config, images, data, journal)


def load_pictures(spec: Spec, settings: Settings, artifacts: Path) -> tuple[Sequence[NDArray[np.uint8]], Pictures]:
    """Some real pictures at the model's input size for perf_analyzer, and as files as many as LoadGen needs.

    Raises:
        DataError: there are none.
    """
    from ssd_client.preprocess import SUFFIXES

    from build.gate import datasets

    fix = "name a folder with some: invoke perf --images FOLDER"
    if settings.images:
        paths = sorted(path for path in Path(settings.images).glob("*") if path.suffix.lower() in SUFFIXES)
        if not paths:
            why = "there is no such folder, or nothing in it ends in " + ", ".join(SUFFIXES)
            raise DataError(f"{settings.images} holds no pictures", why=why, fix=fix)
        pictures = datasets.Pictures(settings.images, tuple(paths))
    elif not spec.data.held_out:
        what = f"{spec.path}: [data] names no held-out pictures, so there is nothing real to send"
        raise DataError(what, fix=fix)
    else:
        count = spec.data.held_out_count if settings.accuracy else IN_MEMORY
        data = replace(spec.data, held_out_count=min(count, spec.data.held_out_count))
        pictures = datasets.held_out(replace(spec, data=data), artifacts / "datasets")
    return [datasets.load(path, spec.input)[0] for path in pictures.paths[:PICTURES]], pictures
