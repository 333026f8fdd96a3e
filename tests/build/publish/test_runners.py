"""The threads that compute in our backend."""

from __future__ import annotations

from contextlib import closing
from queue import SimpleQueue
from typing import Any

import psutil
import pytest
import tritonclient.grpc as triton_grpc

from build.serve import TritonServer
from perf.direct import split
from tests.reliability.overload import feeds

REQUESTS, ABREAST = 30, 4


@pytest.mark.triton
def test_as_many_threads_compute_as_requests_run_at_once(native: None, triton_server: TritonServer) -> None:
    """However many instances wait: spread over their threads, computing leaves cores idle (docs/perf.md)."""
    runners, threads = split(triton_server.model_config("shapes"))
    server = psutil.Process(triton_server.pid)

    def used() -> dict[int, float]:
        return {thread.id: thread.user_time + thread.system_time for thread in server.threads()}

    before = used()
    answered: SimpleQueue[Any] = SimpleQueue()
    with closing(triton_grpc.InferenceServerClient(triton_server.grpc_url)) as client:
        for sent in range(REQUESTS + ABREAST):
            if sent >= ABREAST:
                assert answered.get(timeout=60) is None
            if sent < REQUESTS:
                client.async_infer("shapes", feeds(1), lambda result, error: answered.put(error))
    shares = sorted((seconds - before.get(thread, 0.0) for thread, seconds in used().items()), reverse=True)
    assert sum(shares[: runners * threads]) > 0.8 * sum(shares) > 0, shares
