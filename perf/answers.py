"""Whether a server under load still answers correctly.

    expected = expected_answers(server.repository / "shapes" / server.models["shapes"], config, images)
    with AnswerCheck(server.grpc_url, "shapes", images, expected) as check:
        point = run(...)
    check.result

While perf_analyzer makes the load, a small share of the requests comes from here: known pictures, alone and in batches
of different ones. The answers must equal those of the served file, run in this process. perf_analyzer measures the time
of every request and checks no answer; this check does the opposite.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import itertools
import json
import random
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from build.contract import Target
from build.gate.verify import Tolerance, tolerance
from build.session import runner
from perf.direct import feeds, served_file, thresholds

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from ssd_client import AsyncSSDClient
    from ssd_client.config import ModelConfig

    Arrays = Mapping[str, NDArray[Any]]

SHARE = 0.05  # of the load's requests, at most
EXAMPLES = 5
GRACE = 5.0  # seconds beyond its own time that a request may take to end


@dataclass(frozen=True)
class Expected:
    """What a model answers to known pictures.

    Attributes:
        rows: of each picture its outputs by name, without the batch dimension.
        within: how far an answer may be from them: the tolerance of the model's runtime and precision.
        max_batch_size: most pictures in one request.
    """

    rows: tuple[dict[str, NDArray[Any]], ...]
    within: Tolerance
    max_batch_size: int


def expected_answers(
    folder: Path,
    config: ModelConfig,
    images: Sequence[NDArray[np.uint8]],
    values: Mapping[str, float] | None = None,
) -> Expected:
    """Runs the served file in this process, one picture at a time.

    Args:
        folder: the served version's, with model.onnx, or with model.plan and manifest.json (on its GPU).
        config: the model's, as its server tells it.
        images: UINT8 [H,W,3], at the model's input size.
        values: its thresholds; None = those that the server's model has.

    Raises:
        ServeError: the folder holds neither.
        EngineError: the plan cannot run here.
        VerifyError: there is no tolerance for this runtime and precision.
    """
    within = tolerance(Target(config.runtime, config.precision))
    requests = feeds(images, thresholds(config) if values is None else values)
    path = served_file(folder)
    if path.suffix == ".onnx":
        import onnx

        run = runner(onnx.load(path))
        answers = [run(request) for request in requests]
    else:
        from build.tensorrt.plan import Plan
        from build.tensorrt.plugins import PLUGIN

        engine = json.loads((folder / "manifest.json").read_bytes())["engine"]
        with Plan(path, engine, plugin=PLUGIN) as plan:
            answers = [plan(request) for request in requests]
    rows = tuple({name: array[0] for name, array in answer.items()} for answer in answers)
    return Expected(rows, within, config.max_batch_size)


def difference(answer: Arrays, wanted: Arrays, within: Tolerance) -> str:
    """How one picture's outputs differ from the expected ones, as a piece of a sentence; empty where they do not.

    There must be as many detections, of the same classes, and each box and score within the tolerance. Neighbours in
    the order may change places where their scores are that close. Behind the last detection all must be empty.
    """
    import numpy as np

    number, due = int(answer["num_detections"][0]), int(wanted["num_detections"][0])
    if number != due:
        return f"{number} detections instead of {due}"
    boxes, scores, classes = (answer[f"detection_{name}"] for name in ("boxes", "scores", "classes"))
    if boxes[due:].any() or scores[due:].any() or (classes[due:] != -1).any():
        return f"what follows its {due} detections is not empty"
    box_due, score_due, class_due = (wanted[f"detection_{name}"][:due] for name in ("boxes", "scores", "classes"))
    off_box = np.abs(boxes[:due, None] - box_due).max(-1)
    off_score = np.abs(scores[:due, None] - score_due)
    same_class = classes[:due, None] == class_due
    # In this form NaN never matches.
    same = same_class & (off_box <= within.detection_boxes) & (off_score <= within.detection_scores)
    free = set(range(due))
    for i in range(due):
        partner = next((j for j in (i, *free) if j in free and same[i, j]), None)
        if partner is not None:
            free.remove(partner)
        elif not same_class[i, i]:
            return f"detection {i} is of class {classes[i]} instead of {class_due[i]}"
        elif not off_box[i, i] <= within.detection_boxes:
            return f"box {i} is off by {off_box[i, i]:.2g}"
        else:
            return f"score {i} is {scores[i]:.3g} instead of {score_due[i]:.3g}"
    return ""


class AnswerCheck:
    """Asks a server under load about known pictures while it is in a `with` block, from a thread of its own.

    Its requests come at random moments: they form no rhythm of their own and do not fall in step with the server's.
    A failing server neither raises an error here nor keeps the block from ending.

    Args:
        url: `host:port` of the endpoint that belongs to `protocol`.
        model: name on the server.
        images: UINT8 [H,W,3], at the model's input size.
        expected: what `expected_answers` says of them.
        rate: requests per second on average, in turn a batch and a single picture; fewer where they would be more than
            one request of the load in 20.
        clients: how many requests of the load are on the way at once, to know how many that is.
        batch_size: pictures of a batch, which are all different; fewer where the model or `images` has not so many.
        late_ms: a single picture whose answer takes longer counts as late; None = none does. (Batches take longer.)
        protocol: grpc or http.
        shared_memory: system = pictures are handed over in shared memory. A perf_analyzer that uses it unregisters
            that of all clients when it starts and ends; they then register anew.
        timeout: seconds after which an answer counts as dropped.

    Raises:
        InvalidInputError: a wrong url, protocol or timeout.
    """

    def __init__(
        self,
        url: str,
        model: str,
        images: Sequence[NDArray[np.uint8]],
        expected: Expected,
        *,
        rate: float = 4.0,
        clients: int = 1,
        batch_size: int = 4,
        late_ms: float | None = None,
        protocol: Literal["grpc", "http"] = "grpc",
        shared_memory: Literal["system"] | None = None,
        timeout: float = 10.0,
    ) -> None:
        from ssd_client import AsyncSSDClient

        self._images, self._expected = images, expected
        self._rate, self._clients, self._late_ms, self._timeout = rate, clients, late_ms, timeout
        self._batch_size = min(batch_size, len(images), expected.max_batch_size)
        # One try for each request: a client that tries again would hide what is looked for.
        self._client = AsyncSSDClient(
            url, model=model, protocol=protocol, shared_memory=shared_memory, timeout=timeout, retries=0
        )
        self._counts = dict.fromkeys(("checked", "wrong", "dropped", "late"), 0)
        self._wrong: list[str] = []
        self._dropped: dict[str, int] = {}

    @property
    def result(self) -> dict[str, Any]:
        """`checked` pictures that were answered, of these `wrong` and `late` ones; `dropped`: pictures without an
        answer; `examples`: some of the wrong ones and every reason for no answer, a sentence each."""
        reasons = [f"{count} pictures without an answer: {reason}" for reason, count in self._dropped.items()]
        return {**self._counts, "examples": self._wrong + reasons[:EXAMPLES]}

    def __enter__(self) -> AnswerCheck:
        self._stop = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="checked answers", daemon=True)
        self._thread.start()
        self._asking = asyncio.run_coroutine_threadsafe(self._ask(), self._loop)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        try:
            self._asking.result(self._timeout + GRACE)
        except concurrent.futures.TimeoutError:
            self._asking.cancel()
            self._drop(1, f"no end of the request within {self._timeout + GRACE:g} s")
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(GRACE)
            if not self._thread.is_alive():
                self._loop.close()

    async def _ask(self) -> None:
        from ssd_client import SSDClientError

        next_picture = itertools.count()
        moments = random.Random(len(self._images))
        try:
            with contextlib.suppress(SSDClientError):  # whatever is wrong shows again below
                await self._client.model_config()  # connected: what follows takes as long as a request
            for asked in itertools.count():
                size = 1 if asked % 2 else self._batch_size
                pictures = [next(next_picture) % len(self._images) for _ in range(size)]
                took = await self._request(self._client, pictures)
                pause = max(moments.expovariate(self._rate), took / (SHARE * self._clients))
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._stop.wait(), pause)
                if self._stop.is_set():
                    break
        finally:
            with contextlib.suppress(SSDClientError):
                await self._client.close()

    async def _request(self, client: AsyncSSDClient, pictures: Sequence[int]) -> float:
        """Asks once and notes what came; how many seconds of the server's it took."""
        import numpy as np
        from ssd_client import SSDClientError

        batch = np.stack([self._images[picture] for picture in pictures])
        begun = time.perf_counter()
        try:
            outputs = await client.infer(batch)
        except SSDClientError as error:
            self._drop(len(pictures), str(error).partition("\n")[0])
            return 0.0
        took = time.perf_counter() - begun
        self._counts["checked"] += len(pictures)
        if self._late_ms is not None and len(pictures) == 1 and took * 1000 > self._late_ms:
            self._counts["late"] += 1
        for row, picture in enumerate(pictures):
            answer = {name: array[row] for name, array in outputs.items()}
            fault = difference(answer, self._expected.rows[picture], self._expected.within)
            if fault:
                self._counts["wrong"] += 1
                if len(self._wrong) < EXAMPLES:
                    self._wrong.append(self._sentence(fault, answer, row, pictures))
        return took

    def _sentence(self, fault: str, answer: Arrays, row: int, pictures: Sequence[int]) -> str:
        """Which picture has what fault, and whose answer it got where it got another one's."""
        where = f"picture {row + 1} of a batch of {len(pictures)}" if len(pictures) > 1 else "a picture sent alone"
        if answer["num_detections"][0] > 0:  # nothing found looks like every picture in which there is nothing
            owners = [
                picture
                for picture, wanted in enumerate(self._expected.rows)
                if not difference(answer, wanted, self._expected.within)
            ]
            beside = [other + 1 for other, picture in enumerate(pictures) if picture in owners]
            if beside:
                return f"{where}: {fault}; looks like picture {beside[0]}'s answer: rows were swapped"
            if owners:
                return f"{where}: {fault}; looks like the answer to another request"
        return f"{where}: {fault}"

    def _drop(self, count: int, reason: str) -> None:
        self._counts["dropped"] += count
        self._dropped[reason] = self._dropped.get(reason, 0) + count
