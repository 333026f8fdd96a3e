"""The models of one Triton server that obey the client's contract, and a client for each."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Any

from PIL import Image
from ssd_client import Detections, ModelConfig, SSDClient
from ssd_client.exceptions import AccessDeniedError, ModelConfigError, ModelNotFoundError, ModelNotReadyError
from ssd_client.messages import Message
from ssd_client.transport import Transport, transport_for

from .settings import Settings

# Seconds until the server is asked again for its models. A newly published version is seen after this time.
FRESH = 5.0
_AFTER_A_MISS = 0.5


@dataclass(frozen=True)
class Served:
    """A model that is ready.

    Attributes:
        config: its configuration.
        version: the version that is served.
    """

    config: ModelConfig
    version: str


class Models:
    """Safe from several threads.

    Args:
        settings: of the gateway.
        clock: seconds that only grow.
    """

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings, self._clock = settings, clock
        self._endpoint = settings.endpoint
        self._index: Transport | None = None
        self._clients: dict[str, SSDClient] = {}
        self._served: dict[str, Served] = {}
        self._waiting: dict[str, str] = {}  # models without a version that is ready, and why
        self._looked = -FRESH
        self._lock = Lock()

    def served(self, fresh: float = FRESH) -> dict[str, Served]:
        """The models by name, sorted.

        Args:
            fresh: seconds for which an earlier look counts.

        Raises:
            AccessDeniedError: Triton does not let this gateway in.
            ServerUnavailableError: Triton does not answer.
            RequestTimeoutError: it does not answer in time.
        """
        if self._clock() - self._looked < fresh:
            return self._served
        if not self._lock.acquire(timeout=self._settings.timeout):
            raise self._endpoint.timed_out(self._settings.timeout)
        try:
            if self._clock() - self._looked >= fresh:
                self._served = self._look()
                self._looked = self._clock()
            return self._served
        finally:
            self._lock.release()

    def choose(self, name: str) -> Served:
        """A model by name; without a name the default.

        Raises:
            ModelNotReadyError: the server knows it, but no version of it is ready.
            ModelNotFoundError: it is not there, or no model is.
            SSDClientError: what `served` raises.
        """
        served = self.served()
        wanted = name or self.default(served)
        if wanted not in served:
            served = self.served(_AFTER_A_MISS)
            wanted = name or self.default(served)
        if wanted in self._waiting:
            raise ModelNotReadyError(
                f"the server at {self._endpoint} has no version of model {wanted!r} ready: {self._waiting[wanted]}",
                why="it is being loaded, or did not load",
                fix="wait a moment, and look at the server's log",
            )
        if wanted not in served:
            what = f"the server at {self._endpoint} has no model {wanted!r}" if wanted else "no model"
            raise ModelNotFoundError(
                f"{what} that is ready and obeys the contract; it has {sorted(served) or 'none'}",
                why="the name is misspelt, or the model is not published, or did not load",
                fix="choose one of these, or publish it: ./invoke build-engines",
            )
        return served[wanted]

    def default(self, served: dict[str, Served]) -> str:
        """The model of requests that name none; "" if there is none."""
        return self._settings.model or next(iter(served), "")

    def detect(self, model: Served, image: Image.Image, score: float | None, iou: float | None) -> Detections:
        """The objects in a picture.

        Args:
            model: from `choose`.
            image: RGB.
            score: the score threshold, 0..1; None = the model's own.
            iou: the IoU threshold, 0..1; None = the model's own.
        """
        return self._clients[model.config.name].detect(image, score_threshold=score, iou_threshold=iou)

    def close(self) -> None:
        """Close every connection."""
        for client in self._clients.values():
            client.close()
        if self._index is not None:
            self._index.close()

    def _look(self) -> dict[str, Served]:
        from tritonclient.grpc import service_pb2

        if self._index is None:
            self._index = transport_for(self._endpoint)
        try:
            question = Message("RepositoryIndex", service_pb2.RepositoryIndexRequest(), {})
            index = self._index.send(question, self._settings.timeout).models
            ready = {each.name: each.version for each in index if each.state == "READY"}
            waiting = {each.name: each.reason or each.state or "unknown" for each in index}
        except AccessDeniedError:  # a server may close this API (deploy/docker/serve.sh does); its statistics stay open
            question = Message("ModelStatistics", service_pb2.ModelStatisticsRequest(), {})
            loaded = self._index.send(question, self._settings.timeout).model_stats
            ready, waiting = {each.name: each.version for each in loaded}, {}
        self._waiting = {name: reason for name, reason in waiting.items() if name not in ready}
        served = {}
        for name in sorted(ready):
            try:
                served[name] = Served(self._client(name).model_config(refresh=True), ready[name])
            except (ModelConfigError, ModelNotFoundError):  # of somebody else, or gone since the list was made
                continue
        return served

    def _client(self, name: str) -> SSDClient:
        if name not in self._clients:
            self._clients[name] = SSDClient(
                self._settings.triton,
                model=name,
                protocol="grpc",
                ssl=self._settings.tls,
                headers=dict(self._settings.headers),
                shared_memory="system" if self._settings.shared_memory else None,
                timeout=self._settings.timeout,
                retries=1,
                max_pixels=self._settings.max_pixels,
            )
        return self._clients[name]


def describe(served: dict[str, Served]) -> list[dict[str, Any]]:
    """The models as `/info` shows them."""
    return [
        {
            "name": name,
            "version": model.version,
            "labels": list(model.config.labels),
            "input_size": [model.config.input_width, model.config.input_height],
            "score_threshold": model.config.score_threshold,
            "lowest_score_threshold": model.config.lowest_score_threshold,
            "iou_threshold": model.config.iou_threshold,
            "runtime_thresholds": model.config.runtime_thresholds,
            "max_detections": model.config.max_detections,
            "precision": model.config.precision,
            "runtime": model.config.runtime,
            "manifest_sha256": model.config.manifest_sha256,
        }
        for name, model in served.items()
    ]
