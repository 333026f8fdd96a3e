"""What becomes of requests that their client gave up: the server does not compute them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from google.protobuf import text_format
from ssd_client import RequestTimeoutError, SSDClient
from tritonclient.grpc import model_config_pb2

from build.serve import TritonServer
from tests.client.conftest import CLIENTS, PARAMETERS, config_proto, order, server_on, url_of, write_repository
from tests.client.fake_model import SLEEP

GIVEN_UP = 4


@pytest.fixture(scope="module")
def queueing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """One instance behind a queue as this project's build configures it (build/publish/config.py)."""
    repository = write_repository(tmp_path_factory.mktemp("queue") / "repository", "fake")
    config = config_proto("fake", PARAMETERS)
    config.instance_group[0].count = 1
    config.dynamic_batching.preferred_batch_size.append(1)
    policy = config.dynamic_batching.default_queue_policy
    policy.timeout_action = model_config_pb2.ModelQueuePolicy.REJECT
    policy.default_timeout_microseconds = 30_000_000
    policy.allow_timeout_override = True
    (repository / "fake" / "config.pbtxt").write_text(text_format.MessageToString(config))
    with server_on(repository) as server:
        yield server


@pytest.mark.triton
@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize("client_type", CLIENTS, ids=["sync", "asyncio"])
def test_requests_in_the_queue_are_dropped(queueing: TritonServer, protocol: Any, client_type: Any) -> None:
    url = url_of(queueing, protocol)
    with (
        ThreadPoolExecutor(GIVEN_UP + 1) as threads,
        SSDClient(queueing.grpc_url, model="fake") as patient,
        client_type(url, model="fake", protocol=protocol, timeout=0.2, retries=0) as hasty,
    ):
        patient.model_config(), hasty.model_config()
        before = queueing.images("fake")
        running = threads.submit(patient.infer, order(SLEEP, 10))
        time.sleep(0.1)
        for given_up in [threads.submit(hasty.infer, order(SLEEP, 5)) for _ in range(GIVEN_UP)]:
            with pytest.raises(RequestTimeoutError, match=r"within 0\.2 s"):
                given_up.result()
        running.result()
        begun = time.monotonic()
        patient.infer(order(SLEEP, 0))
        assert time.monotonic() - begun < 0.4, "it waited behind what nobody waits for"
        while queueing.images("fake") - before < 2 and time.monotonic() < begun + 5:  # counted after the answer is sent
            time.sleep(0.02)
        assert queueing.images("fake") - before == 2
