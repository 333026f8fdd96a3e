"""COCO accuracy of what a server answers: the client's detections, judged by build/evaluate.py."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssd_client import SSDClient

    from build.audit import Detector, Found
    from build.evaluate import Accuracy

SCORE_THRESHOLD = 0.01  # COCO's mAP wants the whole precision-recall curve


def evaluate_served(client: SSDClient, pictures: Sequence[Path], truth: dict[str, Any]) -> Accuracy:
    """Accuracy on `pictures`; image id = position + 1, category id = class + 1.

    Raises:
        SSDClientError: the server does not answer.
        SSDError: the ground truth does not fit.
    """
    from build.evaluate import evaluate

    found = client.detect(list(pictures), score_threshold=SCORE_THRESHOLD)
    return evaluate(truth, [row for i, detections in enumerate(found, start=1) for row in detections.to_coco(i)])


@contextlib.contextmanager
def serving(repository: Path, model: str) -> Iterator[tuple[str, Detector]]:
    """A server on `repository`, as the audit takes it: the served precision, and pictures → what is in each."""
    from ssd_client import SSDClient

    from build.audit import Found
    from build.serve import TritonServer

    with TritonServer(repository) as server, SSDClient(server.grpc_url, model=model, shared_memory="system") as client:

        def detector(pictures: Sequence[Path]) -> list[Found]:
            answers = client.detect(list(pictures), score_threshold=SCORE_THRESHOLD)
            return [Found(one.boxes, one.scores, one.class_ids) for one in answers]

        yield client.model_config().precision, detector
