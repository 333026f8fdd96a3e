"""What requests that nobody waits for any more cost the next one: the figures of docs/reliability.md.

    python -m tests.reliability.overload REPOSITORY [--requests 60] [--batch 32]

Sends requests and gives them up, then times a healthy one.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as triton_grpc
from tritonclient.utils import InferenceServerException

from build.serve import TritonServer


def feeds(batch: int, size: int = 300) -> list[Any]:
    """Blank images with thresholds."""
    arrays = {
        "images": np.zeros((batch, size, size, 3), np.uint8),
        "score_threshold": np.full((batch, 1), 0.25, np.float32),
        "iou_threshold": np.full((batch, 1), 0.45, np.float32),
    }
    inputs = []
    for name, array in arrays.items():
        kind = "UINT8" if name == "images" else "FP32"
        inputs.append(triton_grpc.InferInput(name, list(array.shape), kind).set_data_from_numpy(array))
    return inputs


def abandoned(
    server: TritonServer, requests: int, batch: int, *, how: str = "cancel", wait: float = 1.0
) -> dict[str, float]:
    """Seconds that a healthy request takes alone, and after `requests` that were given up.

    Args:
        server: it serves `shapes`.
        requests: how many are sent and given up.
        batch: images of each.
        wait: seconds between sending and giving up.
        how: cancel (the client cancels), deadline (its deadline passes) or timeout (Triton's parameter, in µs).
    """

    def healthy(client: Any) -> float:
        begun = time.perf_counter()
        client.infer("shapes", feeds(1))
        return time.perf_counter() - begun

    with (
        closing(triton_grpc.InferenceServerClient(server.grpc_url)) as client,
        closing(triton_grpc.InferenceServerClient(server.grpc_url)) as other,
    ):
        alone = min(healthy(client) for _ in range(3))
        inputs = feeds(batch)
        options = {"deadline": {"client_timeout": 0.5}, "timeout": {"timeout": 500_000}}.get(how, {})
        calls = [other.async_infer("shapes", inputs, lambda result, error: None, **options) for _ in range(requests)]
        time.sleep(wait)
        if how == "cancel":
            for call in calls:
                call.cancel()
        return {"alone": alone, "after": healthy(client)}


def crowd(server: TritonServer, requests: int, seconds: float = 2.0) -> list[str]:
    """Sends so many requests at once; returns the texts of those that are refused within the time."""
    errors: list[InferenceServerException | None] = []
    with closing(triton_grpc.InferenceServerClient(server.grpc_url)) as client:
        inputs = feeds(1)
        calls = [
            client.async_infer("shapes", inputs, lambda result, error: errors.append(error)) for _ in range(requests)
        ]
        time.sleep(seconds)
        refused = [str(error) for error in errors if error is not None]
        for call in calls:
            call.cancel()
    return refused


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("repository", type=Path)
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--batch", type=int, default=32)
    options = parser.parse_args()
    for how in ("cancel", "deadline", "timeout"):
        with TritonServer(options.repository) as server:
            print(json.dumps({"how": how, **abandoned(server, options.requests, options.batch, how=how)}), flush=True)
    with TritonServer(options.repository) as server:
        refused = crowd(server, 400)
        print(json.dumps({"how": "crowd", "sent": 400, "refused": len(refused), "text": refused[:1]}), flush=True)


if __name__ == "__main__":
    main()
