"""What a gateway can be told."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field

from ssd_client.exceptions import InvalidInputError
from ssd_client.transport import TLS, Endpoint


@dataclass(frozen=True)
class Settings:
    """How one gateway works.

    Attributes:
        triton: Triton's gRPC endpoint, in any form that `SSDClient` takes for gRPC.
        model: the model of requests that name none; "" = the first by name that is ready.
        shared_memory: hand pictures to Triton in shared memory; Triton must run on this machine.
        timeout: seconds for one answer of Triton.
        read_timeout: seconds until a request's header, and again until its body, must be here.
        max_bytes: largest body of a request.
        max_pixels: largest picture, in pixels, that is decoded.
        max_requests: pictures in hand at once, in each worker; more get status 429.
        threads: pictures decoded and asked for at once, in each worker.
        token: what `Authorization: Bearer` must carry; "" = nothing is asked for.
        tls: encrypt what goes to Triton; None = not, unless `triton` begins with https://.
        headers: (name, value) sent to Triton with every request, as metadata.
        hosts: names by which this gateway may be called; () = any. It keeps out pages of others that give
            their own name this machine's address.
    """

    triton: str = "localhost:8001"
    model: str = ""
    shared_memory: bool = False
    timeout: float = 5.0
    read_timeout: float = 10.0
    max_bytes: int = 20 * 1024 * 1024
    max_pixels: int = 50_000_000
    max_requests: int = 32
    threads: int = 4
    token: str = field(default="", repr=False)
    tls: TLS | None = None
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    hosts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        endpoint = self.endpoint  # raises for what is no address
        if self.shared_memory and endpoint.is_balanced:
            raise InvalidInputError(
                f"shared memory with several servers ({self.triton})",
                fix="give the one address of the server on this machine, or leave --shared-memory out",
            )
        for name in ("timeout", "read_timeout"):
            if not 0 < getattr(self, name) < math.inf:
                raise InvalidInputError(f"{name} is {getattr(self, name)!r}", fix="give seconds, more than 0")
        for name in ("max_bytes", "max_pixels", "max_requests", "threads"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name} is {getattr(self, name)!r}", fix="give at least 1")
        if not self.token.isascii() or not self.token.isprintable() or " " in self.token:
            raise InvalidInputError(
                "the token has characters that an HTTP header cannot carry", fix="use letters, digits, - and _"
            )

    @property
    def endpoint(self) -> Endpoint:
        """Where Triton is, for requests that are about no single model."""
        return Endpoint.parse(self.triton, "grpc", self.model or "any", self.tls, dict(self.headers))

    def to_json(self) -> str:
        """For a worker. The token and the headers are in it."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> Settings:
        """What `to_json` made."""
        values = json.loads(text)
        tls, headers = values["tls"], tuple((name, value) for name, value in values["headers"])
        values |= {"tls": TLS(**tls) if tls else None, "headers": headers, "hosts": tuple(values["hosts"])}
        return cls(**values)
