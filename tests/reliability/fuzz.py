"""Requests with faults, over HTTP and gRPC: seeded, so that a failure can be had again.

    PYTHONPATH=.:client python -m tests.reliability.fuzz REPOSITORY --requests 15000

What Triton itself cannot bear (docs/security.md: deep JSON, bodies of one-byte chunks, gzip, shared memory that is cut)
is not among them.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2

from build.serve import TritonServer

METHOD = "/inference.GRPCInferenceService/ModelInfer"
SIZES = (-(2**63), -1, 0, 1, 2, 3, 5, 33, 2**31, 2**32, 2**63 - 1)
KINDS = ("UINT8", "FP32", "INT32", "BYTES", "BOOL", "FP64", "", "NONE", "TYPE_FP32")
NAMES = ("images", "score_threshold", "iou_threshold", "detection_boxes", "", "imag\u00e9s", "a" * 3000, "\x00")


class Fuzzer:
    """Makes requests for the tiny model and breaks them.

    Args:
        seed: the same seed gives the same requests.
    """

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)

    def _parts(self) -> tuple[list[dict[str, Any]], list[bytes]]:
        """A valid request: its inputs and their bytes."""
        batch = self._chance.choice((1, 1, 2, 4))
        arrays = {
            "images": np.frombuffer(self._chance.randbytes(batch * 192), np.uint8).reshape(batch, 8, 8, 3),
            "score_threshold": np.full((batch, 1), 0.1, np.float32),
            "iou_threshold": np.full((batch, 1), 0.5, np.float32),
        }
        inputs = []
        for name, array in arrays.items():
            kind = "UINT8" if name == "images" else "FP32"
            inputs.append({"name": name, "datatype": kind, "shape": list(array.shape)})
        return inputs, [array.tobytes() for array in arrays.values()]

    def _break(self, inputs: list[dict[str, Any]], data: list[bytes]) -> None:
        chance = self._chance
        for _ in range(chance.choice((0, 1, 1, 1, 2, 3))):
            at = chance.randrange(len(inputs))
            what = chance.choice(("shape", "rank", "kind", "name", "cut", "more", "values", "drop", "twice"))
            if what == "shape":
                shape = inputs[at]["shape"]
                if shape:
                    shape[chance.randrange(len(shape))] = chance.choice(SIZES)
            elif what == "rank":
                inputs[at]["shape"] = [chance.choice((1, 2, 192)) for _ in range(chance.randrange(6))]
            elif what == "kind":
                inputs[at]["datatype"] = chance.choice(KINDS)
            elif what == "name":
                inputs[at]["name"] = chance.choice(NAMES)
            elif what == "cut":
                data[at] = data[at][: chance.randrange(len(data[at]) + 1)]
            elif what == "more":
                data[at] += chance.randbytes(chance.choice((1, 3, 4, 192, 100_000)))
            elif what == "values":
                data[at] = chance.randbytes(len(data[at]))
            elif what == "drop" and len(inputs) > 1:
                del inputs[at], data[at]
            elif what == "twice":
                inputs.append(dict(inputs[at]))
                data.append(data[at])

    def over_http(self) -> tuple[dict[str, str], bytes]:
        """Headers and body."""
        chance = self._chance
        inputs, data = self._parts()
        self._break(inputs, data)
        for entry, content in zip(inputs, data, strict=True):
            size: Any = len(content)
            if chance.random() < 0.1:
                size = chance.choice((*SIZES, "7", None, 1.5))
            entry["parameters"] = {"binary_data_size": size}
        header: dict[str, Any] = {"inputs": inputs}
        if chance.random() < 0.5:
            names = [chance.choice(NAMES) for _ in range(chance.randrange(4))]
            header["outputs"] = [{"name": name, "parameters": {"binary_data": True}} for name in names]
        if chance.random() < 0.2:
            header["parameters"] = {chance.choice(("timeout", "priority", "sequence_id", "x")): chance.choice(SIZES)}
        text = bytearray(json.dumps(header).encode())
        if chance.random() < 0.2:
            for _ in range(chance.randrange(1, 4)):
                text[chance.randrange(len(text))] = chance.randrange(256)
        length = len(text) if chance.random() < 0.9 else chance.choice((0, 1, len(text) - 1, len(text) + 1, 10**7, -1))
        return {"Inference-Header-Content-Length": str(length)}, bytes(text) + b"".join(data)

    def over_grpc(self) -> bytes:
        """A ModelInferRequest as bytes."""
        chance = self._chance
        inputs, data = self._parts()
        self._break(inputs, data)
        request = service_pb2.ModelInferRequest(model_name="tiny")
        for entry in inputs:
            shape = [size for size in entry["shape"] if -(2**63) <= size < 2**63]
            request.inputs.add(name=entry["name"], datatype=entry["datatype"], shape=shape)
        request.raw_input_contents.extend(data[: chance.randrange(len(data) + 1)] if chance.random() < 0.1 else data)
        if chance.random() < 0.3:
            request.outputs.add(name=chance.choice((*NAMES, "num_detections")))
        if chance.random() < 0.1 and request.inputs:
            request.inputs[0].contents.fp32_contents.extend([1.0] * chance.randrange(50))
        message = bytearray(request.SerializeToString())
        if chance.random() < 0.2:
            for _ in range(chance.randrange(1, 4)):
                message[chance.randrange(len(message))] = chance.randrange(256)
        return bytes(message)


def fuzz(server: TritonServer, requests: int, seed: int) -> Counter[str]:
    """Sends so many requests over each protocol; counts those that were `answered` and `refused`.

    Raises:
        AssertionError: a connection ended without an answer.
    """
    fuzzer, counts = Fuzzer(seed), Counter[str]()
    host, port = server.http_url.rsplit(":", 1)
    with closing(http.client.HTTPConnection(host, int(port), timeout=30)) as connection:
        for number in range(requests):
            headers, body = fuzzer.over_http()
            try:
                connection.request("POST", "/v2/models/tiny/infer", body, headers)
                answer = connection.getresponse()
                answer.read()
            except (http.client.HTTPException, OSError) as error:
                raise AssertionError(f"HTTP request {number} of seed {seed} had no answer: {error!r}") from error
            counts["answered" if answer.status == 200 else "refused"] += 1
    with grpc.insecure_channel(server.grpc_url) as channel:
        call = channel.unary_unary(METHOD)
        for number in range(requests):
            try:
                call(fuzzer.over_grpc(), timeout=30)
                counts["answered"] += 1
            except grpc.RpcError as error:
                if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                    raise AssertionError(f"gRPC request {number} of seed {seed}: {error}") from error
                counts["refused"] += 1
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("repository", type=Path)
    parser.add_argument("--requests", type=int, default=15_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with TritonServer(options.repository) as server:
        print(json.dumps(fuzz(server, options.requests, options.seed)))
        server.check()


if __name__ == "__main__":
    main()
