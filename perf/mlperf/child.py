"""One run of LoadGen in a process of its own: `python -m perf.mlperf.child FOLDER`.

LoadGen is C++ that calls back into Python. A response that is never completed hangs it for ever, and an exception in a
callback ends the process with a segmentation fault. So no callback here raises, a request that fails is completed
without data and counted, and perf/mlperf/runs.py gives every run a process and a deadline.

FOLDER holds request.json: {served (`Served`), settings (fields of LoadGen's TestSettings), workers, batch}. It receives
LoadGen's four logs and outcome.json: what was answered to each picture and how often, the requests that failed and why,
the seconds that were measured.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from ssd_client import ModelConfig
    from ssd_client.preprocess import Placement

REQUEST, OUTCOME = "request.json", "outcome.json"
IN_MEMORY = 256  # pictures of a performance run
STOPPED = 143  # exit code of a run that was told to stop
_WATCH_S = 0.2


@dataclass(frozen=True)
class Served:
    """A model on a running server, and the pictures to ask it about.

    Attributes:
        model: its name on the server.
        url: of the endpoint that belongs to `protocol`; empty = the null system, which answers nothing at once and so
            shows what LoadGen and its process cost.
        pictures: files, in the order of the ground truth: the position is LoadGen's sample index.
        rule: the fields of `ssd_client.rule.Preprocessing`: how pictures become the model's input.
        max_batch_size: most pictures in a request.
        score_threshold: sent with every picture; None = the model takes none.
        protocol, shared_memory: how pictures reach the server.
        timeout: seconds after which a request counts as failed.
    """

    model: str
    url: str
    pictures: Sequence[str]
    rule: Mapping[str, Any]
    max_batch_size: int
    score_threshold: float | None
    protocol: str = "http"
    shared_memory: str | None = "system"
    timeout: float = 10.0

    @classmethod
    def of(cls, config: ModelConfig, url: str, pictures: Sequence[Path], threshold: float, **how: Any) -> Served:
        """The model that a server describes by `config`; `how`: protocol, shared_memory, timeout."""
        score = threshold if config.runtime_thresholds else None
        files, rule = [str(path) for path in pictures], asdict(config.preprocessing)
        return cls(config.name, url, files, rule, config.max_batch_size, score, **how)


def payload(index: int, outputs: Mapping[str, NDArray[Any]], row: int, placement: Placement) -> NDArray[np.float32]:
    """A picture's detections as MLPerf's public accuracy script reads them: FP32 [n,7].

    The columns are sample index, ymin, xmin, ymax, xmax (0..1 of the picture), score, class + 1.
    """
    import numpy as np

    count = int(outputs["num_detections"][row, 0])
    width, height = placement.image_size
    result = np.empty((count, 7), np.float32)
    result[:, 0] = index
    boxes = placement.to_image(outputs["detection_boxes"][row, :count]) / (width, height, width, height)
    result[:, 1:5] = boxes[:, [1, 0, 3, 2]]
    result[:, 5] = outputs["detection_scores"][row, :count]
    result[:, 6] = outputs["detection_classes"][row, :count] + 1
    return result


class NullClient:
    """Answers at once that there is nothing in any picture."""

    def infer(self, images: NDArray[np.uint8], score_threshold: float | None = None) -> dict[str, NDArray[Any]]:
        import numpy as np

        empty = np.zeros((len(images), 1), np.int32)
        return {"num_detections": empty, **{f"detection_{name}": empty for name in ("boxes", "scores", "classes")}}

    def close(self) -> None:
        pass


class System:
    """LoadGen's system under test and its sample library: a client of the served model.

    Args:
        served: the model and its pictures.
        client: an `SSDClient`, or what answers in its place.
        workers: threads that send requests; 0 = LoadGen's own thread waits for each answer.
        batch: most pictures in a request.
    """

    def __init__(self, served: Served, client: Any, workers: int, batch: int) -> None:
        self._served, self._client, self._workers, self._batch = served, client, workers, batch
        self._loaded: dict[int, tuple[NDArray[np.uint8], Placement]] = {}
        self._todo: queue.SimpleQueue[list[tuple[int, int]]] = queue.SimpleQueue()
        self.lock, self._stopped, self._asking = threading.Lock(), threading.Event(), 0
        self.answers: Counter[tuple[int, bytes]] = Counter()
        self.errors: Counter[str] = Counter()
        for number in range(workers):
            threading.Thread(target=self._work, name=f"client {number}", daemon=True).start()

    # What LoadGen calls. An exception here would end the process with a segmentation fault.

    def load(self, indices: Sequence[int]) -> None:
        """Brings pictures into memory; LoadGen does not measure it."""
        from ssd_client.preprocess import input_array
        from ssd_client.rule import Preprocessing

        rule = Preprocessing(**self._served.rule)
        for index in indices:
            try:
                self._loaded[index] = input_array(self._served.pictures[index], rule)
            except Exception as error:  # its request will fail, and be counted
                self._failed(f"{Path(self._served.pictures[index]).name} cannot be read: {error}", 1)

    def unload(self, indices: Sequence[int]) -> None:
        """Lets go of pictures."""
        for index in indices:
            self._loaded.pop(index, None)

    def issue(self, samples: Sequence[Any]) -> None:
        """Takes queries: LoadGen's response ids with the indices of their pictures."""
        asked = [(sample.id, sample.index) for sample in samples]
        # Spread over the workers, as the instances of a server are idle until they have something to do.
        size = min(self._batch, max(1, -(-len(asked) // max(1, self._workers))))
        for start in range(0, len(asked), size):
            part = asked[start : start + size]
            if self._workers:
                self._todo.put(part)
            else:
                self.answer(part)

    def flush(self) -> None:
        """Nothing is held back."""

    def _work(self) -> None:
        while True:
            self.answer(self._todo.get())

    def answer(self, asked: Sequence[tuple[int, int]]) -> None:
        """Sends one request and completes its samples, with their detections or with nothing."""
        import numpy as np

        with self.lock:
            self._asking += 1
        if self._stopped.is_set():  # the process is about to end: this thread does not go on
            with self.lock:
                self._asking -= 1
            threading.Event().wait()
        answered: list[NDArray[np.float32] | None] = [None] * len(asked)
        try:
            loaded = [self._loaded[index] for _, index in asked]
            images = np.stack([image for image, _ in loaded]) if len(loaded) > 1 else loaded[0][0][None]
            outputs = self._client.infer(images, self._served.score_threshold)
            rows = enumerate(zip(asked, loaded, strict=True))
            answered = [payload(index, outputs, row, placement) for row, ((_, index), (_, placement)) in rows]
        except Exception as error:
            self._failed(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}", len(asked))
        complete([(response, array) for (response, _), array in zip(asked, answered, strict=True)])
        with self.lock:
            self._asking -= 1
            for (_, index), array in zip(asked, answered, strict=True):
                if array is not None:
                    self.answers[index, array.tobytes()] += 1

    def stop(self, seconds: float) -> None:
        """Sends nothing more, and waits for the requests on the way: they hold shared memory."""
        self._stopped.set()
        deadline = time.monotonic() + seconds
        while self._asking and time.monotonic() < deadline:
            time.sleep(0.01)

    def _failed(self, reason: str, count: int) -> None:
        with self.lock:
            self.errors[reason] += count


def complete(answers: Sequence[tuple[int, NDArray[np.float32] | None]]) -> None:
    """Hands answers to LoadGen, which copies what it logs; None is a response without data."""
    import mlperf_loadgen as loadgen

    responses = []
    for response, array in answers:
        size = 0 if array is None else array.nbytes
        responses.append(loadgen.QuerySampleResponse(response, array.ctypes.data if size else 0, size))  # type: ignore[union-attr]
    loadgen.QuerySamplesComplete(responses)


def run(folder: Path, system: System, served: Served, settings: Mapping[str, Any]) -> float:
    """LoadGen's test, with its logs in `folder`; the seconds that it took.

    Args:
        folder: is there: LoadGen aborts without.
        system: under test.
        served: what it asks.
        settings: fields of TestSettings; enumerations by the names of their members.
    """
    import mlperf_loadgen as loadgen

    test, kinds = loadgen.TestSettings(), {"scenario": loadgen.TestScenario, "mode": loadgen.TestMode}
    for name, value in settings.items():
        setattr(test, name, getattr(kinds[name], value) if name in kinds else value)
    output, log = loadgen.LogOutputSettings(), loadgen.LogSettings()
    output.outdir, output.copy_summary_to_stdout = str(folder), False
    log.log_output, log.enable_trace = output, bool(served.url)  # the null system's trace would be large
    count = len(served.pictures)
    sut = loadgen.ConstructSUT(system.issue, system.flush)
    library = loadgen.ConstructQSL(count, min(IN_MEMORY, count), system.load, system.unload)
    started = time.monotonic()
    try:
        loadgen.StartTestWithLogSettings(sut, library, test, log)
    finally:
        loadgen.DestroyQSL(library)
        loadgen.DestroySUT(sut)
    return time.monotonic() - started


def client_of(served: Served, retries: int = 0) -> Any:
    """A client of the server, warm; the null one where there is no server.

    Args:
        served: the model.
        retries: 0, as a client that tries again would hide what failed.

    Raises:
        SSDClientError: the server does not answer.
    """
    if not served.url:
        return NullClient()
    from ssd_client import SSDClient

    how: dict[str, Any] = {"protocol": served.protocol, "shared_memory": served.shared_memory}
    client = SSDClient(served.url, model=served.model, timeout=served.timeout, retries=retries, **how)
    client.model_config()
    return client


def main(folder: Path) -> int:
    """Runs LoadGen in a thread; this one waits for it, or to be told to stop.

    Returns:
        0, or 143 where it was told to stop. A client that cannot connect is an exception.
    """
    request = json.loads((folder / REQUEST).read_text())
    served = Served(**request["served"])
    client = client_of(served)
    system = System(served, client, request["workers"], request["batch"])
    parent, stop, outcome = os.getppid(), threading.Event(), dict[str, Any]()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started this decides what Ctrl-C means
    signal.signal(signal.SIGTERM, lambda *_: stop.set())

    def work() -> None:
        try:
            outcome["seconds"] = run(folder, system, served, request["settings"])
        except BaseException as error:
            outcome["failed"] = f"{type(error).__name__}: {error}"

    loadgen = threading.Thread(target=work, name="LoadGen", daemon=True)
    loadgen.start()
    while loadgen.is_alive() and not stop.is_set() and os.getppid() == parent:
        loadgen.join(_WATCH_S)
    stopped = loadgen.is_alive()
    with system.lock:
        outcome["errors"] = dict(system.errors)
        outcome["answers"] = [[index, data.hex(), count] for (index, data), count in system.answers.items()]
    (folder / OUTCOME).write_text(json.dumps({**outcome, "stopped": stopped}))
    system.stop(2.0)
    closing = threading.Thread(target=client.close, daemon=True)  # it may wait for a request that is never answered
    closing.start()
    closing.join(2.0)
    return STOPPED if stopped else 0


if __name__ == "__main__":
    code = main(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads are still in LoadGen, or in requests: Python's own end would crash in them
