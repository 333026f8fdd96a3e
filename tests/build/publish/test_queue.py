"""Overload: nobody waits for what nobody wants any more, and a queue has an end. For both backends of the CPU."""

from __future__ import annotations

import re
import urllib.request
from contextlib import closing

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
from tritonclient.utils import InferenceServerException

from build.serve import TritonServer
from perf.direct import split
from tests.reliability.overload import abandoned, crowd, feeds

GIVEN_UP, IMAGES = 12, 16


@pytest.mark.triton
@pytest.mark.parametrize("how", ["cancel", "timeout"])
def test_requests_that_were_given_up_are_not_computed(server: TritonServer, how: str) -> None:
    before = server.images("shapes")
    abandoned(server, GIVEN_UP, IMAGES, how=how, wait=0.1)
    computed = server.images("shapes") - before
    assert computed < GIVEN_UP * IMAGES, "every one of them ran"
    if how == "cancel":
        # Those that ran already, and what the healthy requests had.
        runners, _ = split(server.model_config("shapes"))
        assert computed <= (3 * runners + 2) * IMAGES


@pytest.mark.triton
def test_a_full_queue_refuses_at_once_and_says_why(server: TritonServer) -> None:
    limit = server.model_config("shapes")["dynamic_batching"]["default_queue_policy"]["max_queue_size"]
    refused = crowd(server, limit + 400, 1.0)
    assert refused
    assert {re.sub("<.*>", "", text) for text in refused} == {
        "[StatusCode.UNAVAILABLE] [request id: ] Exceeds maximum queue size"
    }
    server.check()


def metrics(server: TritonServer) -> dict[str, float]:
    """Failures by reason as Triton counts them, and `invalid`, those of clients."""
    with urllib.request.urlopen(server.metrics_url) as page:
        text = page.read().decode()
    failures = re.findall(r'^nv_inference_request_failure\{model="shapes",reason="(\w+)",[^}]*\} (\S+)$', text, re.M)
    invalid = re.findall(r'^ssd_client_errors\{model="shapes",version="1"\} (\S+)$', text, re.M)
    assert len(invalid) == 1, text
    return {**{reason: float(count) for reason, count in failures}, "invalid": float(invalid[0])}


@pytest.mark.triton
def test_a_clients_error_is_counted_apart(server: TritonServer) -> None:
    """And not among the failures, where alerts look (docs/reliability.md)."""
    before = metrics(server)
    wrong = feeds(1)
    wrong[1].set_data_from_numpy(np.full((1, 1), 7, np.float32))
    with closing(triton_grpc.InferenceServerClient(server.grpc_url)) as client:
        for _ in range(3):
            with pytest.raises(InferenceServerException, match=r"INVALID_ARGUMENT.*must lie in 0\.\.1, got \[7"):
                client.infer("shapes", wrong)
    after = metrics(server)
    assert after["invalid"] - before["invalid"] == 3
    failures = [{**counts, "invalid": 0} for counts in (before, after)]
    assert failures[0] == failures[1]
