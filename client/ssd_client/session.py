"""What both clients do for a request, without any I/O: checks, retries, shared memory and results.

The methods of `Session` are generators. A generator yields the steps that a client has to take: send a message, sleep,
work on pixels. It is resumed with a step's result, or with its error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import random
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from . import answers
from .budget import PixelBudget
from .config import ModelConfig
from .detections import Detections
from .endpoint import Endpoint
from .exceptions import (
    ImageError,
    InferenceError,
    InvalidInputError,
    ModelNotFoundError,
    ModelNotReadyError,
    RequestTimeoutError,
    ServerUnavailableError,
    SharedMemoryError,
    SSDClientError,
)
from .messages import Input, Message, codec_for
from .preprocess import ImageSource, Placement, load_image, out_of_memory, preprocess
from .shared_memory import Region, RegionPool, is_abandoned
from .thresholds import fixed_thresholds, threshold_inputs

Arrays: TypeAlias = "dict[str, NDArray[Any]]"
_FIRST_BACKOFF, _LONGEST_BACKOFF = 0.1, 2.0  # seconds
_CLOSE_TIMEOUT = 2.0  # seconds for making the server let go of shared memory
# Seconds that a server keeps a request in its queue beyond this client's patience: its clock starts later.
_MARGIN = 0.1
_MOST_REPLACEMENTS = 10  # of the model while one request is made

T = TypeVar("T")


@dataclass(frozen=True)
class Send:
    """Send the message and wait for its answer, at most `timeout` seconds."""

    message: Message
    timeout: float


@dataclass(frozen=True)
class Sleep:
    """Wait."""

    seconds: float


@dataclass(frozen=True)
class Work:
    """Let `function` write to `images`, UINT8 [B,H,W,3]. It takes long enough to be worth a thread."""

    function: Callable[[NDArray[np.uint8]], Any]
    images: NDArray[np.uint8]


Step: TypeAlias = Send | Sleep | Work
Steps: TypeAlias = "Generator[Step, Any, T]"


class _Replaced(Exception):  # noqa: N818 - not an error
    """The model was replaced by one that wants another request.

    Args:
        config: of the new one.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.config = config


class Session:
    """Everything that both clients do, without I/O."""

    def __init__(
        self,
        endpoint: Endpoint,
        shared_memory: str | None,
        timeout: float,
        retries: int,
        max_in_flight: int,
        max_pixels: int,
        try_timeout: float | None = None,
    ) -> None:
        if shared_memory not in (None, "system"):
            raise InvalidInputError(f"shared_memory is {shared_memory!r}", fix="give None or 'system'")
        if shared_memory is not None and endpoint.is_balanced:
            raise InvalidInputError(
                f"shared memory with several servers ({endpoint.url})",
                why="a picture would lie in the memory of one server and the request would go to another",
                fix="give the one address of the server on this machine, or use shared_memory=None",
            )
        for name, seconds in (("timeout", timeout), ("try_timeout", timeout if try_timeout is None else try_timeout)):
            if not isinstance(seconds, (int, float)) or not 0 < seconds < math.inf:
                raise InvalidInputError(f"{name} is {seconds!r}", fix="give seconds, more than 0")
        whole = all(isinstance(number, int) for number in (retries, max_in_flight, max_pixels))
        if not whole or retries < 0 or max_in_flight < 1 or max_pixels < 1:
            raise InvalidInputError(
                f"retries is {retries!r}, max_in_flight {max_in_flight!r}, max_pixels {max_pixels!r}",
                fix="give whole numbers: retries of at least 0, and at least 1 for the others",
            )
        self.endpoint = endpoint
        self.max_in_flight = max_in_flight
        self.closed = False
        self._codec = codec_for(endpoint)
        self._shared = shared_memory is not None
        self._timeout, self._retries, self._max_pixels = timeout, retries, max_pixels
        if try_timeout is None:  # one that hangs leaves time for the others
            try_timeout = timeout / (retries + 1) if endpoint.is_balanced else timeout
        self._try_timeout = try_timeout
        self._config: ModelConfig | None = None
        self.start()

    def start(self) -> None:
        """Begin in this process: regions of the one that it was forked from are that one's business."""
        self._regions = RegionPool()
        self._pixels = PixelBudget(self._max_pixels)
        self._swept = False  # whether regions of killed processes were looked for
        self.process = os.getpid()

    @property
    def has_regions(self) -> bool:
        """Whether the server knows or may know shared memory of this client."""
        return len(self._regions) > 0

    def config(self, refresh: bool = False) -> Steps[ModelConfig]:
        """The model's configuration, asked for once and after every interruption of the service."""
        config = self._config
        if config is None or refresh:
            config = yield from self._read_config("")
        return config

    def _read_config(self, version: str) -> Steps[ModelConfig]:
        """The configuration of a version; without a number, of the newest."""
        answer = yield from self._call(self._codec.config(version), wait_for_model=not version)
        config = answers.checked(self.endpoint, self._codec.read_config, answer)
        if version:
            config = dataclasses.replace(config, version=version)
        self._config = config
        return config

    def infer(
        self,
        images: NDArray[np.uint8],
        score_threshold: NDArray[np.float32] | float | None,
        iou_threshold: NDArray[np.float32] | float | None,
    ) -> Steps[Arrays]:
        config = yield from self.config()
        rule = config.preprocessing
        for _ in range(_MOST_REPLACEMENTS):
            row = (config.input_height, config.input_width, 3)
            if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape[1:] != row:
                got = f"{images.dtype}{list(images.shape)}" if isinstance(images, np.ndarray) else type(images).__name__
                raise InvalidInputError(
                    f"images is {got}, model {config.name!r} takes uint8[batch, {row[0]}, {row[1]}, 3]",
                    fix="see preprocess.input_array, or let detect() do it",
                )
            if not 1 <= len(images) <= config.max_batch_size:
                raise InvalidInputError(
                    f"the batch has {len(images)} images, model {config.name!r} takes 1 to {config.max_batch_size}",
                    fix="send it in parts; detect() does",
                )
            if config.preprocessing != rule:
                raise InvalidInputError(
                    f"model {config.name!r} was replaced by one whose input is made by {config.preprocessing}; "
                    f"these images may follow {rule}",
                    fix="make them by model_config().preprocessing, which is the new one's now",
                )
            thresholds = threshold_inputs(config, len(images), score_threshold, iou_threshold)

            def fill(out: NDArray[np.uint8]) -> None:
                out[...] = images

            try:
                if self._shared:
                    _, outputs, _ = yield from self._infer_filled(config, images.shape, fill, thresholds)
                else:
                    _, outputs = yield from self._request(config, images, None, thresholds)
                return outputs
            except _Replaced as replaced:
                config = replaced.config
        raise self._never_the_same()

    def detect(
        self,
        sources: Sequence[ImageSource],
        score_threshold: float | None,
        iou_threshold: float | None,
        first: int | None,
    ) -> Steps[list[Detections]]:
        """One request's worth of pictures; `first` is the number of the first one in the caller's list."""
        config = yield from self.config()
        for _ in range(_MOST_REPLACEMENTS):
            try:
                results: list[Detections] = []
                while len(results) < len(sources):  # once, unless a new version takes fewer at once
                    start = len(results)
                    part = sources[start : start + config.max_batch_size]
                    number = None if first is None else first + start
                    results += yield from self._detect(config, part, score_threshold, iou_threshold, number)
                return results
            except _Replaced as replaced:
                config = replaced.config
        raise self._never_the_same()

    def _detect(
        self,
        config: ModelConfig,
        sources: Sequence[ImageSource],
        score_threshold: float | None,
        iou_threshold: float | None,
        first: int | None,
    ) -> Steps[list[Detections]]:
        keep_above = None
        if not config.runtime_thresholds:
            keep_above, score_threshold = fixed_thresholds(config, score_threshold, iou_threshold), None
            iou_threshold = None
        thresholds = threshold_inputs(config, len(sources), score_threshold, iou_threshold)

        def fill(out: NDArray[np.uint8]) -> list[Placement]:
            return [self._prepare(source, config, out, k, first) for k, source in enumerate(sources)]

        shape = (len(sources), config.input_height, config.input_width, 3)
        answered, outputs, placements = yield from self._infer_filled(config, shape, fill, thresholds, heavy=True)
        return [
            _detections(answered, outputs, k, placement, source, keep_above, self._max_pixels)
            for k, (placement, source) in enumerate(zip(placements, sources, strict=True))
        ]

    def _never_the_same(self) -> InferenceError:
        return InferenceError(
            f"model {self.endpoint.model!r} at {self.endpoint} changed {_MOST_REPLACEMENTS} times during one request",
            why="several servers behind one address serve versions that want different input",
            fix="let all of them serve the same version",
        )

    def split(self, count: int, config: ModelConfig) -> list[slice]:
        """Requests for `count` pictures: none above the model's batch, and enough to keep `max_in_flight` busy."""
        size = min(config.max_batch_size, math.ceil(count / self.max_in_flight))
        return [slice(start, start + size) for start in range(0, count, size)]

    def close(self) -> Steps[None]:
        """Make the server let go of the shared memory. The transport is closed by its owner."""
        self.closed = True
        if os.getpid() != self.process:  # a fork must not take its parent's regions away
            return
        deadline = time.monotonic() + _CLOSE_TIMEOUT
        regions = self._regions.clear()
        for region in regions:
            region.hide()
        for region in regions:
            while True:
                try:
                    yield Send(self._codec.unregister(region.name), _CLOSE_TIMEOUT)
                    break
                except (ServerUnavailableError, RequestTimeoutError):
                    return  # without a server there are no mappings
                except SSDClientError:  # the server still works on a request that was given up
                    if time.monotonic() > deadline:
                        break
                    yield Sleep(_FIRST_BACKOFF)

    def _prepare(
        self, source: ImageSource, config: ModelConfig, out: NDArray[np.uint8], k: int, first: int | None
    ) -> Placement:
        try:
            with self._pixels.share() as take:
                image = load_image(source, max_pixels=self._max_pixels, before_decoding=take)
                return preprocess(image, config.preprocessing, out[k])
        except MemoryError:
            raise out_of_memory(source) from None
        except ImageError as error:
            if first is None:
                raise
            raise ImageError(f"picture {first + k} of the list: {error}") from error

    def _infer_filled(
        self,
        config: ModelConfig,
        shape: tuple[int, ...],
        fill: Callable[[NDArray[np.uint8]], T],
        thresholds: Sequence[Input],
        heavy: bool = False,
    ) -> Steps[tuple[ModelConfig, Arrays, T]]:
        """Let `fill` write the images to where they are sent from, and send them; see `_request`."""
        if not self._shared:
            images = np.empty(shape, np.uint8)
            filled: T = (yield Work(fill, images)) if heavy else fill(images)
            return *(yield from self._request(config, images, None, thresholds)), filled
        for last in (False, True):
            region = yield from self._region(math.prod(shape), fresh=last)
            known = True
            try:
                images = region.images(shape)
                filled = (yield Work(fill, images)) if heavy else fill(images)
                return *(yield from self._request(config, images, region.name, thresholds)), filled
            except SharedMemoryError as error:
                known = False  # a server that was started again does not know the regions of its predecessor
                self._regions.forget(region)
                if last:
                    raise SharedMemoryError(
                        f"the server at {self.endpoint} took shared memory, and then did not know it: {error}",
                        why="several servers stand behind this address, and request and memory went to different ones",
                        fix="give the address of the one server on this machine, or use shared_memory=None",
                    ) from error
            finally:
                if known:
                    self._regions.give_back(region)
        raise AssertionError("unreachable")

    def _request(
        self, config: ModelConfig, images: NDArray[np.uint8], region: str | None, thresholds: Sequence[Input]
    ) -> Steps[tuple[ModelConfig, Arrays]]:
        """One request, made by `config`, and the configuration of the version that answered.

        Raises:
            _Replaced: that version wants another request.
        """
        try:
            message = self._codec.infer(
                [Input("images", images, region), *thresholds], min(self._timeout, self._try_timeout) + _MARGIN
            )
            sent = yield from self._call(message)
        except (InvalidInputError, SharedMemoryError):  # refused: it may fit the version before
            newer = yield from self.config(refresh=True)
            if not newer.asks_like(config) or newer.max_batch_size < len(images):
                raise _Replaced(newer) from None
            raise
        answer = answers.checked(self.endpoint, self._codec.read_answer, sent)
        answered = yield from self._config_of(answer.version, config)
        if not answered.asks_like(config):
            raise _Replaced(answered)
        return answered, answers.outputs(self.endpoint, answered, len(images), answer)

    def _config_of(self, version: str, config: ModelConfig) -> Steps[ModelConfig]:
        """The configuration of the version that answered a request made by `config`."""
        current = self._config
        if current is None:  # the service was interrupted: a number may mean another model now
            current = yield from self.config()
        if version in ("", current.version):
            return current
        if version == config.version:
            return config
        try:
            return (yield from self._read_config(version))
        except ModelNotFoundError:  # it was replaced already
            newest = yield from self.config(refresh=True)
            raise _Replaced(newest) from None

    def _region(self, byte_size: int, fresh: bool) -> Steps[Region]:
        """A region of at least this size that is registered with the server. With `fresh` it is a new one."""
        region = None if fresh else self._regions.take()
        if region is not None:
            if region.byte_size >= byte_size:
                return region
            with contextlib.suppress(SSDClientError):  # in use by a request that was given up: close() sees to it
                yield Send(self._codec.unregister(region.name), self._timeout)
                self._regions.forget(region)
        if not self._swept:
            self._swept = True
            yield from self._sweep()
        region = Region(byte_size)
        # Before it is registered: a task that is cancelled in between does not know whether it was.
        self._regions.add(region)
        try:
            yield from self._call(self._codec.register(region.name, region.key, byte_size))
        except (InferenceError, InvalidInputError, SharedMemoryError) as error:
            self._regions.forget(region)
            if isinstance(error, SharedMemoryError):
                raise
            raise SharedMemoryError(  # the wording of some versions names no region
                f"the server at {self.endpoint} does not take shared memory: {error}",
                why="Triton 2.68 and newer must be started with --allow-client-shm=true",
                fix="start it accordingly, or use shared_memory=None",
            ) from error
        finally:
            region.hide()
        return region

    def _sweep(self) -> Steps[None]:
        """Make the server let go of what killed clients of this machine left with it."""
        with contextlib.suppress(SSDClientError):  # of a server that restricts this, for example
            names = answers.checked(
                self.endpoint, self._codec.read_regions, (yield Send(self._codec.regions(), self._try_timeout))
            )
            for name in filter(is_abandoned, names):
                yield Send(self._codec.unregister(name), self._try_timeout)

    def _call(self, message: Message, wait_for_model: bool = True) -> Steps[Any]:
        """Send, and send again while the server is away and there is time; inference may be repeated without harm."""
        if self.closed:
            raise SSDClientError("the client is closed", fix="make a new one")
        deadline = time.monotonic() + self._timeout
        for attempt in range(self._retries + 1):
            left = max(deadline - time.monotonic(), 0.001)
            try:
                return (yield Send(message, min(left, self._try_timeout)))
            except RequestTimeoutError:
                if left <= self._try_timeout:
                    raise self.endpoint.timed_out(self._timeout) from None
                if attempt == self._retries:
                    raise
            except (ServerUnavailableError, ModelNotReadyError) as error:
                if isinstance(error, ModelNotReadyError) and not wait_for_model:
                    raise  # that version was replaced, and does not come back
                self._config = None  # whatever comes back may be another model
                backoff = min(_LONGEST_BACKOFF, _FIRST_BACKOFF * 2**attempt) * random.uniform(0.5, 1.0)
                if attempt == self._retries or time.monotonic() + backoff >= deadline:
                    raise
                yield Sleep(backoff)
        raise AssertionError("unreachable")


def _detections(
    config: ModelConfig,
    outputs: Arrays,
    row: int,
    placement: Placement,
    source: ImageSource,
    keep_above: float | None,
    max_pixels: int,
) -> Detections:
    boxes, scores, classes = (outputs[f"detection_{name}"][row] for name in ("boxes", "scores", "classes"))
    number = int(outputs["num_detections"][row, 0])
    if keep_above is not None:
        number = int((scores[:number] > keep_above).sum())  # best first
    ids = classes[:number].astype(np.int32)
    return Detections(
        boxes=placement.to_image(boxes[:number]),
        scores=scores[:number].astype(np.float32),
        class_ids=ids,
        labels=tuple(config.labels[k] for k in ids.tolist()),
        image_size=placement.image_size,
        source=source,
        max_pixels=max_pixels,
    )
