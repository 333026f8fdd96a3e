"""A client that was used before a fork: every process makes its own connections and shared memory."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import ssd_client

from build.serve import TritonServer
from tests.client.conftest import server_regions

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.triton

# Children and parent use the client side by side, each with pictures of its own; every answer is compared.
PROGRAM = """
    import asyncio, os, sys, threading
    import numpy as np
    from ssd_client import AsyncSSDClient, SSDClient
    from tests.client import fake_model
    from tests.client.conftest import HEIGHT, WIDTH

    grpc, http, mode = sys.argv[1:]

    def picture(seed):
        image = np.random.default_rng(seed).integers(0, 256, (1, HEIGHT, WIDTH, 3), dtype=np.uint8)
        image[:, 0, 0] = 0
        return image

    def wrong(call, seeds):
        return sum(
            not np.array_equal(
                call(image)["detection_boxes"][0, 0],
                np.float32(max(fake_model.find(image[0], np.float32(0.45)), key=lambda found: found[0])[2]),
            )
            for image in map(picture, seeds)
        )

    def trial(kind, protocol, memory):
        client = kind({"grpc": grpc, "http": http}[protocol], model="fake", protocol=protocol, shared_memory=memory)
        def on_a_loop():
            loop = asyncio.new_event_loop()
            return lambda image: loop.run_until_complete(client.infer(image))
        make = (lambda: client.infer) if kind is SSDClient else on_a_loop
        call, stop, busy = make(), threading.Event(), []
        assert wrong(call, [0, 1]) == 0
        if mode == "busy":  # another thread's request is on its way at every fork
            def work():
                while not stop.is_set():
                    busy.append(wrong(client.infer, [len(busy)]))
            thread = threading.Thread(target=work)
            thread.start()
        children = []
        for child in range(2):
            process = os.fork()
            if process == 0:
                code = 77
                try:
                    mine = make()
                    code = wrong(mine, range(1000 * child, 1000 * child + 10))
                    client.close() if kind is SSDClient else asyncio.run(client.close())
                finally:
                    os._exit(code)
            children.append(process)
        failures = wrong(call, range(9000, 9010))
        for process in children:
            failures += os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        failures += wrong(call, [2, 3])  # its own connection and region are as they were
        stop.set()
        if mode == "busy":
            thread.join()
        print(kind.__name__, protocol, memory, failures + sum(busy), flush=True)
        client.close() if kind is SSDClient else asyncio.new_event_loop().run_until_complete(client.close())

    for protocol in ("grpc", "http"):
        for memory in (None, "system"):
            for kind in (SSDClient, AsyncSSDClient) if mode == "quiet" else (SSDClient,):
                trial(kind, protocol, memory)
"""


@pytest.mark.parametrize("mode", ["quiet", "busy"])
def test_a_client_used_before_a_fork(server: TritonServer, mode: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), server.grpc_url, server.http_url, mode],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{Path(ssd_client.__file__).parent.parent}"},
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == (8 if mode == "quiet" else 4), done.stderr
    assert [line for line in lines if not line.endswith(" 0")] == [], done.stderr
    assert server_regions(server) == []
