"""`./invoke page`: the server that runs, or a new one, and a gateway in front of it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from build.errors import ServeError
from build.page import server_at
from build.serve import TritonServer

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.triton
def test_takes_the_server_that_runs(triton_server: TritonServer, tmp_path: Path) -> None:
    with server_at(triton_server.grpc_url, tmp_path) as found:
        assert found == (triton_server.grpc_url, False)
    number, port = triton_server.grpc_url.rsplit(":", 1)
    place = f"[::ffff:{number}]:{port}"  # the same by IPv6
    with server_at(place, tmp_path) as found:
        assert found == (place, False)


def test_a_server_that_was_named_and_is_not_there_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("build.page._PATIENCE", 0.3)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(ServeError, match=f"nothing answers at {address}"), server_at(address, tmp_path):
            pass
    with pytest.raises(ServeError, match="is no address"), server_at("localhost:99999", tmp_path):
        pass
    with (
        socket.create_server(("::1", 0), family=socket.AF_INET6) as mute,  # takes connections and says nothing
        pytest.raises(ServeError, match=r"nothing answers at \[::1\]"),
        server_at(f"[::1]:{mute.getsockname()[1]}", tmp_path),
    ):
        pass


@pytest.mark.triton
def test_an_error_of_the_caller_is_not_swallowed(triton_server: TritonServer, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="mine"), server_at(triton_server.grpc_url, tmp_path):
        raise OSError("mine")


@pytest.mark.triton
def test_starts_a_server_where_none_runs(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("build.page._PORT", "9")  # nobody listens there
    with server_at("", repository, log=tmp_path / "log") as (address, started):
        assert started
        with socket.create_connection(("127.0.0.1", int(address.split(":")[1]))):
            pass


@pytest.mark.triton
def test_the_task_prints_an_address_and_stops_at_ctrl_c(triton_server: TritonServer) -> None:
    command = [sys.executable, "-m", "invoke", "page", "--triton", triton_server.grpc_url, "--port", "0"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        address = re.search(r"http://localhost:\d+", process.stdout.readline())
        assert address is not None
        with urllib.request.urlopen(f"{address[0]}/info") as answer:
            assert [model["name"] for model in json.load(answer)["models"]] == ["shapes"]
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=20)[0]
        assert (process.returncode, "stopped" in rest) == (0, True)
    finally:
        process.kill()
        process.wait()
