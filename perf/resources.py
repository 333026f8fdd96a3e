"""What a point of load costs: CPU and memory of the server, of its model, of perf_analyzer; a GPU's as well.

    with Sampler(server.pid) as sampler:
        point = run(...)
    sampler.result(images=point.requests)

CPU time is the kernel's own count, from the beginning to the end; memory and what NVML says of a GPU are looked at a
few times per second.
"""

from __future__ import annotations

import contextlib
import importlib
import statistics
import threading
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import psutil

ANALYZER = "perf_analyzer"
_MIB = 2**20
_LOAD = ("user", "nice", "system", "irq", "softirq")  # of a machine's CPU times; a guest's are among the user's


class Sampler:
    """Watches the processes of a point while it is in a `with` block.

    Args:
        server: process number of tritonserver, with the models that run inside. Its children (the python backend's
            stubs) count as the model.
        interval: seconds between two looks at memory and GPU. A look takes 1.3 ms of CPU where 80 processes run.
        gpu: NVML's number of the GPU that the server uses, if there is one.
    """

    def __init__(self, server: int, *, interval: float = 0.25, gpu: int = 0) -> None:
        import psutil

        self._psutil, self._interval = psutil, interval
        self._server_process: psutil.Process | None = None
        with contextlib.suppress(psutil.Error):
            self._server_process = psutil.Process(server)
        self._gpu = _Gpu.find(gpu)
        self._server, self._model, self._analyzer = _Group(), _Group(), _Group()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="resources", daemon=True)

    def __enter__(self) -> Sampler:
        self._began = (time.monotonic(), self._machine(), self._collected())
        self._look(whole=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._look(whole=True)
        began, machine, collected = self._began
        self._seconds = time.monotonic() - began
        self._busy = self._machine() - machine
        server = self._server_process
        # The last moments of a perf_analyzer that ended between two looks are in what the kernel added to this process
        # when it was collected; so is the whole life of a server that ended, which must not count as perf_analyzer's.
        if self._analyzer.seen and server is not None and server.is_running():
            self._analyzer.seconds = max(self._analyzer.seconds, self._collected() - collected)
        if self._gpu is not None:
            self._gpu.close()

    def result(self, images: float) -> dict[str, Any]:
        """What was used between the beginning and the end of the block.

        Args:
            images: how many were answered in all that time, before and between perf_analyzer's windows as well.

        Returns:
            `seconds`; `server_cores`, `model_cores`, `analyzer_cores`, `other_cores`: CPU seconds per second, of which
            the last are all other programs of the machine and this one; `server_rss_mib`, `model_rss_mib`,
            `analyzer_rss_mib`: the most at one time; `images_per_core`: per CPU second of server and model, None where
            they used none; `gpu`: None, or `utilisation` (mean, %), `memory_mib` (the most), `watts` (mean) and
            `images_per_watt` (images per second per watt), each None where the GPU does not tell.
        """
        groups = {"server": self._server, "model": self._model, "analyzer": self._analyzer}
        ours = sum(group.seconds for group in groups.values())
        serving = self._server.seconds + self._model.seconds
        return {
            "seconds": self._seconds,
            **{f"{name}_cores": group.seconds / self._seconds for name, group in groups.items()},
            "other_cores": max(0.0, self._busy - ours) / self._seconds,
            **{f"{name}_rss_mib": group.rss_mib for name, group in groups.items()},
            "images_per_core": images / serving if serving else None,
            "gpu": self._gpu.result(images / self._seconds) if self._gpu is not None else None,
        }

    def _watch(self) -> None:
        while not self._stop.wait(self._interval):
            self._look()

    def _look(self, whole: bool = False) -> None:
        """One sample; a `whole` one also searches for processes of the server that are new."""
        first = not self._thread.is_alive() and not self._stop.is_set()
        if self._server_process is not None:
            self._server.look([self._server_process], first)
            stubs = self._children(self._server_process) if whole else self._model.processes
            self._model.look(stubs, first)
        if not any(process.is_running() for process in self._analyzer.processes):
            analyzers = [child for child in self._children(self._psutil.Process()) if _is_analyzer(child)]
        else:
            analyzers = self._analyzer.processes
        self._analyzer.look(analyzers, first)
        if self._gpu is not None:
            self._gpu.look()

    def _children(self, process: psutil.Process) -> list[psutil.Process]:
        with contextlib.suppress(self._psutil.Error):
            return process.children(recursive=True)
        return []

    def _machine(self) -> float:
        times = self._psutil.cpu_times()
        return float(sum(getattr(times, name) for name in _LOAD))

    def _collected(self) -> float:
        """CPU seconds of the children of this process that have ended."""
        times = self._psutil.Process().cpu_times()
        return float(times.children_user + times.children_system)


class _Group:
    """Processes that are counted together."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.rss_mib = 0.0
        self.processes: list[psutil.Process] = []
        self._used: dict[psutil.Process, float] = {}

    @property
    def seen(self) -> bool:
        """Whether there ever was one."""
        return bool(self._used)

    def look(self, processes: Iterable[psutil.Process], first: bool) -> None:
        """Adds what they used since the last look; what a process used before the first one does not count."""
        import psutil

        self.processes, rss = list(processes), 0.0
        for process in self.processes:
            with contextlib.suppress(psutil.Error), process.oneshot():
                times = process.cpu_times()
                used = times.user + times.system
                self.seconds += used - self._used.get(process, used if first else 0.0)
                self._used[process] = used
                rss += process.memory_info().rss / _MIB
        self.rss_mib = max(self.rss_mib, rss)


class _Gpu:
    """What NVML says of one GPU."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        self._samples: dict[str, list[float]] = {"utilisation": [], "memory_mib": [], "watts": []}

    @classmethod
    def find(cls, number: int) -> _Gpu | None:
        """None where nvidia-ml-py, the driver or the GPU is missing."""
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            return None
        try:
            nvml.nvmlInit()
            return cls(nvml, nvml.nvmlDeviceGetHandleByIndex(number))
        except nvml.NVMLError:
            return None

    def look(self) -> None:
        questions: dict[str, Callable[[], float]] = {
            "utilisation": lambda: float(self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu),
            "memory_mib": lambda: self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used / _MIB,
            "watts": lambda: self._nvml.nvmlDeviceGetPowerUsage(self._handle) / 1000,
        }
        for name, ask in questions.items():
            with contextlib.suppress(self._nvml.NVMLError):  # not every GPU, nor every part of one, tells everything
                self._samples[name].append(ask())

    def result(self, images_per_second: float) -> dict[str, float | None]:
        figures: dict[str, float | None] = {
            name: (max if name == "memory_mib" else statistics.fmean)(values) if values else None
            for name, values in self._samples.items()
        }
        watts = figures["watts"]
        return {**figures, "images_per_watt": images_per_second / watts if watts else None}

    def close(self) -> None:
        with contextlib.suppress(self._nvml.NVMLError):
            self._nvml.nvmlShutdown()


def _is_analyzer(process: psutil.Process) -> bool:
    import psutil

    with contextlib.suppress(psutil.Error):
        return process.name() == ANALYZER
    return False
