"""Who may reach a tritonserver: its addresses, TLS, and the endpoints that need a token."""

from __future__ import annotations

import ipaddress
import json
import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ssd_client.exceptions import InvalidInputError
from ssd_client.ports import port_of

from build.errors import ServeError
from build.files import ARTIFACTS, explained, relative

TOKEN_FILE = ARTIFACTS / "logs" / "admin-token"
TOKEN_HEADER = "ssd-admin"  # over gRPC: triton-grpc-protocol-ssd-admin
# What changes the server or reads and writes other people's memory; asking for detections needs none of them.
RESTRICTED = ("model-repository", "shared-memory", "trace", "logging")

_HERE = "127.0.0.1"
_ANY = {"0.0.0.0": _HERE, "::": "::1"}


@dataclass(frozen=True)
class Tls:
    """Files in PEM format for gRPC.

    Attributes:
        certificate, key: the server's.
        clients: certificates of the authorities that sign clients' certificates; None = clients need none.
    """

    certificate: Path
    key: Path
    clients: Path | None = None


@dataclass(frozen=True)
class Exposure:
    """Where a server listens, and what it asks of clients.

    With TLS, HTTP and metrics listen on this machine only: Triton has TLS for gRPC alone.

    Attributes:
        host: an address: 127.0.0.1, 0.0.0.0, ::1, ::, or one of this machine's.
        tls: for gRPC; None = plain text.
        token: what `RESTRICTED` endpoints ask for in the header `TOKEN_HEADER`; empty = they are open.
    """

    host: str = _HERE
    tls: Tls | None = None
    token: str = ""

    def address(self, which: str) -> str:
        """The address that an endpoint (http, grpc or metrics) listens on."""
        return _HERE if self.tls and which != "grpc" else self.host

    def reached_at(self, which: str, port: int) -> str:
        """`host:port` of an endpoint for a client on this machine."""
        host = _ANY.get(self.address(which), self.address(which))
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    @property
    def open(self) -> bool:
        """Whether other machines reach it."""
        return not ipaddress.ip_address(self.host).is_loopback

    @property
    def headers(self) -> Mapping[str, str]:
        """What HTTP requests to restricted endpoints carry."""
        return {TOKEN_HEADER: self.token} if self.token else {}

    def arguments(self, ports: Mapping[str, int]) -> list[str]:
        """The arguments for tritonserver, given a port for each of http, grpc and metrics."""
        arguments = []
        for which, port in ports.items():
            address = self.address(which)
            if ":" in address:  # its HTTP library and its gRPC library each write IPv6 in their own way
                address = f"[{address}]" if which == "grpc" else f"ipv6:{address}"
            arguments += [f"--{which}-address={address}", f"--{which}-port={port}"]
        if self.tls:
            arguments += [
                f"--grpc-use-ssl{'-mutual' if self.tls.clients else ''}=true",
                f"--grpc-server-cert={self.tls.certificate}",
                f"--grpc-server-key={self.tls.key}",
                *([f"--grpc-root-cert={self.tls.clients}"] if self.tls.clients else []),
            ]
        if self.token:
            rule = f"{','.join(RESTRICTED)}:{TOKEN_HEADER}={self.token}"
            arguments += [f"--http-restricted-api={rule}", f"--grpc-restricted-protocol={rule}"]
        return arguments

    def warnings(self) -> list[str]:
        """What the person who opens a server to the network should know."""
        if not self.open:
            return []
        lines = [f"WARNING: every machine that reaches {self.host} can use this server (docs/security.md)"]
        if self.tls:
            lines.append("gRPC is encrypted; HTTP and metrics, which Triton cannot encrypt, answer this machine only")
            if not self.tls.clients:
                lines.append("clients need no certificate: --ssl-clients FILE asks for one")
        else:
            lines.append("nothing is encrypted: --ssl-cert FILE --ssl-key FILE encrypts gRPC")
        if self.host == "::":
            lines.append("over IPv4, gRPC alone is reached: Triton's HTTP listens on IPv6 then")
        return lines


def exposure(host: str, cert: str = "", key: str = "", clients: str = "", token_file: Path = TOKEN_FILE) -> Exposure:
    """What the options of `./invoke serve` ask for. A server for other machines gets a token.

    Args:
        host: the address.
        cert, key, clients: files for TLS; empty = none.
        token_file: keeps the token, readable by this user only; one that is there is used again.

    Raises:
        ServeError: files are missing, or the token cannot be kept.
    """
    if bool(cert) != bool(key) or (clients and not cert):
        options = {"--ssl-cert": cert, "--ssl-key": key, "--ssl-clients": clients}
        given = " ".join(option for option, file in options.items() if file)
        raise ServeError(f"TLS needs a certificate and its key, given is {given}", fix="--ssl-cert FILE --ssl-key FILE")
    for file in filter(None, (cert, key, clients)):
        if not Path(file).is_file():
            raise ServeError(f"{file}: there is no such file", fix="name a PEM file")
    tls = Tls(Path(cert), Path(key), Path(clients) if clients else None) if cert else None
    asked = Exposure(_address(host), tls)
    return Exposure(asked.host, tls, _token(token_file)) if asked.open else asked


def _address(host: str) -> str:
    """The address of a name, for Triton takes no names.

    Raises:
        ServeError: it has none.
    """
    try:
        found = socket.getaddrinfo(host or None, None, type=socket.SOCK_STREAM) if host else []
    except OSError:
        found = []
    addresses = sorted({str(entry[4][0]) for entry in found}, key=lambda address: ":" in address)
    if not addresses:
        raise ServeError(
            f"host is {host!r}, which is no address and no name of one",
            fix="give one of this machine's: 127.0.0.1, ::1, 0.0.0.0 or :: (all)",
        )
    return addresses[0]


def _token(path: Path) -> str:
    with explained(path, "the token for administration cannot be kept", ServeError):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            path.touch(mode=0o600)
            path.write_text(secrets.token_urlsafe(24) + "\n")
        token = path.read_text(encoding="utf-8-sig").strip()
    if len(token) < 16 or json.dumps(token) != f'"{token}"' or any(mark in token for mark in " ,:="):
        raise ServeError(f"{relative(path)} holds no token", fix="remove it, then a new one is made")
    return token


def ports_of(given: Mapping[str, int | str]) -> dict[str, int]:
    """The ports as numbers, 0 = a free one.

    Args:
        given: what was given for each of http, grpc and metrics.

    Raises:
        ServeError: one is no port, or one is given twice.
    """
    ports: dict[str, int] = {}
    for which, value in given.items():
        try:
            port = port_of(value, f"--{which}-port")
        except InvalidInputError as error:
            raise ServeError(str(error)) from None
        twice = next((other for other, taken in ports.items() if port and taken == port), None)
        if twice is not None:
            raise ServeError(f"--{twice}-port and --{which}-port are both {port}", fix="give two; 0 takes a free one")
        ports[which] = port
    return ports
