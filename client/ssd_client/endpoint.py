"""Where a model is, how it is reached, and the errors that name the place."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import ssl
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies_environment, proxy_bypass_environment  # type: ignore[attr-defined]

from .exceptions import (
    AccessDeniedError,
    InferenceError,
    InvalidInputError,
    ModelNotFoundError,
    ModelNotReadyError,
    RequestTimeoutError,
    ServerUnavailableError,
    SharedMemoryError,
    SSDClientError,
)
from .ports import HIGHEST

DEFAULT_PORTS = {"grpc": 8001, "http": 8000}
_SCHEME_PORTS = {"http": 80, "https": 443}
_HOST = r"\[[0-9A-Fa-f:.%]+\]|[^\s:/\[\]@?#,\\%]+"
_URL = re.compile(rf"(?:(https?)://)?({_HOST})(?::(\d{{1,5}}))?(/[^\s?#]*)?", re.ASCII)
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_OWN_HEADERS = ("content-length", "inference-header-content-length", "transfer-encoding", "host")
_MOST_REASON = 1000  # characters of a server's words in an error
# What gRPC itself says where no server does.
_NO_CONNECTION = re.compile(
    r"connect|socket|reset|broken pipe|goaway|dns|name resolution|address|recvmsg|sendmsg|stream removed|endpoint|"
    r"end of file|eof|ping|handshake|certificate|ssl|proxy|http2|transport|unavailable$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class TLS:
    """Encrypt, and check the server's certificate.

    Attributes:
        root_certificates: PEM file with the authorities to trust; None = the system's.
        certificate_chain: PEM file with this client's own certificate, where the server asks for one.
        private_key: PEM file with the key of `certificate_chain`.
    """

    root_certificates: str | Path | None = None
    certificate_chain: str | Path | None = None
    private_key: str | Path | None = None

    def read(self) -> tuple[bytes | None, bytes | None, bytes | None]:
        """The contents of (root_certificates, private_key, certificate_chain).

        Raises:
            InvalidInputError: a file cannot be read.
        """
        paths = (self.root_certificates, self.private_key, self.certificate_chain)
        try:
            root, key, chain = (Path(path).read_bytes() if path is not None else None for path in paths)
        except OSError as error:
            raise InvalidInputError(f"cannot read the TLS file {error.filename}: {error.strerror}") from None
        return root, key, chain

    def context(self) -> ssl.SSLContext:
        """For HTTPS.

        Raises:
            InvalidInputError: a file cannot be read or is not PEM.
        """
        self.read()
        try:
            context = ssl.create_default_context(cafile=self.root_certificates)
            if self.certificate_chain is not None:
                context.load_cert_chain(self.certificate_chain, self.private_key)
        except (OSError, ValueError) as error:
            raise InvalidInputError(f"the TLS files {self} cannot be used: {error}", fix="give PEM files") from None
        return context


@dataclass(frozen=True)
class Endpoint:
    """Where the model is.

    Attributes:
        addresses: `host:port` of every server, or gRPC's own form: `dns:///host:port`, `unix:/path`.
        protocol: `grpc` or `http`.
        model: the model's name.
        tls: None = not encrypted.
        path: HTTP's base path, such as `/prefix`; empty if there is none.
        headers: (name, value) sent with every request: HTTP headers, or gRPC metadata.
        proxy: URL of the proxy that the environment names for this place; None = there is none.
    """

    addresses: tuple[str, ...]
    protocol: str
    model: str
    tls: TLS | None = None
    path: str = ""
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    proxy: str | None = field(default=None, repr=False)

    @classmethod
    def parse(
        cls,
        url: str | Sequence[str],
        protocol: str | None,
        model: str,
        tls: TLS | None,
        headers: Mapping[str, str] | None = None,
    ) -> Endpoint:
        """Check the arguments, fill in the default port, and look for a proxy in the environment.

        Args:
            url: `host:port`, `http(s)://host:port/prefix`, `dns:///host:port`, `unix:/path`, or several `host:port` in
                a list or with commas between them.
            protocol: `grpc` or `http`; None = what the URL's scheme says, and gRPC where it has none.
            model: the model's name.
            tls: None = not encrypted unless the URL's scheme is https.
            headers: sent with every request.

        Raises:
            InvalidInputError: one of them is wrong.
        """
        if protocol not in (None, *DEFAULT_PORTS):
            raise InvalidInputError(f"protocol is {protocol!r}", fix="give 'grpc' or 'http'")
        if not isinstance(model, str) or not model:
            raise InvalidInputError(f"model is {model!r}", fix="give the name of a model on the server")
        if tls is not None and not isinstance(tls, TLS):
            raise InvalidInputError(f"ssl is {tls!r}", fix="give TLS(), or None")
        several = isinstance(url, Sequence) and not isinstance(url, (str, bytes))
        urls: list[Any] = url.split(",") if isinstance(url, str) else list(url) if several else [url]
        parts = [_Place.parse(each, protocol) for each in urls]
        if not parts:
            raise InvalidInputError(f"url is {url!r}", fix="give host:port")
        first = parts[0]
        if any((each.protocol, each.scheme, each.path) != (first.protocol, first.scheme, first.path) for each in parts):
            raise InvalidInputError(f"url is {url!r}", fix="give all addresses in the same form")
        if len(parts) > 1 and (first.protocol != "grpc" or any(each.is_target for each in parts)):
            raise InvalidInputError(
                f"url is {url!r}: several addresses need gRPC and the form host:port",
                fix="use protocol='grpc' with host:port each, or put a load balancer before the servers",
            )
        if first.scheme == "http" and tls is not None:
            raise InvalidInputError(f"url is {url!r}, but ssl is given", fix="write https://, or leave ssl out")
        if first.scheme == "https" and tls is None:
            tls = TLS()
        proxies = {proxy for each in parts if (proxy := each.proxy(tls is not None))}
        if proxies and len(parts) > 1:
            raise InvalidInputError(
                f"several addresses cannot go through the proxy {_without_password(min(proxies))} of the environment",
                fix="name the servers in no_proxy, or give one address",
            )
        return cls(
            tuple(each.address for each in parts),
            first.protocol,
            model,
            tls,
            first.path,
            _headers(headers or {}, first.protocol),
            min(proxies, default=None),
        )

    @property
    def url(self) -> str:
        """All addresses, with the base path, as people know them."""
        return ",".join(self.addresses) + self.path

    @property
    def is_balanced(self) -> bool:
        """Whether requests go to several servers in turn."""
        return len(self.addresses) > 1 or self.addresses[0].startswith("dns:")

    def __str__(self) -> str:
        through = f", through the proxy {_without_password(self.proxy)}" if self.proxy else ""
        return f"{self.url} ({self.protocol}{', TLS' if self.tls else ''}{through})"

    def unavailable(self, reason: str) -> ServerUnavailableError:
        fix = "start it, or check url, protocol (gRPC usually 8001, HTTP 8000) and ssl"
        if self.proxy:
            fix += f"; the environment names the proxy: if it cannot reach {self.url}, add its host to no_proxy"
        return ServerUnavailableError(
            f"no server answers at {self}: {reason[:_MOST_REASON]}",
            why="it is not running, just went away, or listens on another port or protocol",
            fix=fix,
        )

    def timed_out(self, seconds: float) -> RequestTimeoutError:
        return RequestTimeoutError(
            f"no answer from {self} within {seconds:.3g} s",
            why="the server is overloaded, or something between here and there drops packets",
            fix="raise timeout, send smaller batches or fewer requests at once",
        )

    def timed_out_there(self, reason: str) -> RequestTimeoutError:
        return RequestTimeoutError(
            f"what stands before {self} got no answer in time (HTTP 504): {reason[:_MOST_REASON]}",
            why="the server is overloaded or hangs",
            fix="send smaller batches or fewer requests at once, or raise the gateway's timeout",
        )

    def broken(self, what: str) -> InferenceError:
        return InferenceError(
            f"the answer from {self} makes no sense: {what[:_MOST_REASON]}",
            why="it is no Triton server, or the model breaks its own configuration",
            fix="check the url, and the server's log",
        )

    def refused(self, code: str, reason: str) -> SSDClientError:
        """The error for an answer that is one; `code` is gRPC's name of it, or `HTTP` and the status."""
        reason = reason[:_MOST_REASON]
        if code in ("PERMISSION_DENIED", "UNAUTHENTICATED") or " is restricted, expecting header" in reason:
            return AccessDeniedError(
                f"the server at {self} does not let this client in ({code}): {reason}",
                why="it wants a token, or restricts this kind of request"
                if code != "HTTP 407"
                else "the proxy wants a user and a password",
                fix="give headers={name: token} (the command line: --header 'NAME: TOKEN'); Triton's restricted APIs "
                "want the name that its message gives",
            )
        if "has no available versions" in reason or "is not at ready state" in reason:
            return ModelNotReadyError(
                f"the server at {self} has no version of model {self.model!r} ready: {reason}",
                why="it is being loaded, or did not load",
                fix="wait a moment, and look at the server's log",
            )
        if code == "CANCELLED" or (code == "UNAVAILABLE" and _NO_CONNECTION.search(reason)):
            return self.unavailable(reason)
        if "shared memory region" in reason:
            return SharedMemoryError(
                f"the server at {self} does not take shared memory: {reason}",
                why="it runs on another machine, in a container with a /dev/shm of its own, as another user, "
                "or it is Triton 2.68 or newer and was started without --allow-client-shm=true",
                fix="start it accordingly (docker run --ipc=host), or use shared_memory=None",
            )
        if code == "UNAVAILABLE":
            return ServerUnavailableError(
                f"the server at {self} cannot take the request now: {reason}",
                why="it is overloaded, starting or stopping",
                fix="send fewer requests at once, or try again later",
            )
        if code == "NOT_FOUND":
            return ModelNotFoundError(
                f"the server at {self} does not have model {self.model!r}: {reason}",
                why="the name is wrong, or the model was not published or did not load",
                fix=f"look at the server's log, or ask it: POST {self.url}/v2/repository/index (HTTP port)",
            )
        if code == "INVALID_ARGUMENT":
            return InvalidInputError(
                f"the server at {self} refused the request to model {self.model!r}: {reason}",
                why="the model was replaced by one with another input since its configuration was read",
                fix="read it again: model_config(refresh=True)",
            )
        return InferenceError(
            f"the server at {self} failed on model {self.model!r} ({code}): {reason}", fix="look at the server's log"
        )


@dataclass(frozen=True)
class _Place:
    """One address."""

    protocol: str
    scheme: str
    address: str
    path: str
    host: str

    @classmethod
    def parse(cls, url: str, protocol: str | None) -> _Place:
        """Read one address; `protocol` decides unless it is None."""
        url = url.strip() if isinstance(url, str) else url
        chosen = protocol or ("http" if str(url).startswith(("http:", "https:")) else "grpc")
        wrong = InvalidInputError(
            f"url is {_without_password(url) if isinstance(url, str) else repr(url)}",
            fix=f"give host:port, such as localhost:{DEFAULT_PORTS[chosen]}, or https://host:port/prefix; "
            "tokens and passwords: headers={...}; TLS without a scheme: ssl=TLS()",
        )
        if not isinstance(url, str):
            raise wrong
        if chosen == "grpc" and re.fullmatch(r"unix:(//)?/\S+", url):
            return cls(chosen, "", url, "", "")
        is_target = url.startswith("dns:///")
        match = _URL.fullmatch(url.removeprefix("dns:///"))
        if match is None or (is_target and (chosen != "grpc" or match[1] or match[4])):
            raise wrong
        scheme, host, path = match[1] or "", match[2], (match[4] or "").rstrip("/")
        port = int(match[3] or _SCHEME_PORTS.get(scheme) or DEFAULT_PORTS[chosen])
        if not 0 < port <= HIGHEST:
            raise wrong
        if path and chosen == "grpc":
            raise InvalidInputError(f"url is {url!r}: gRPC knows no base path", fix="use protocol='http', or host:port")
        return cls(chosen, scheme, f"{'dns:///' if is_target else ''}{host}:{port}", path, host)

    @property
    def is_target(self) -> bool:
        """Whether it is gRPC's own form of an address."""
        return self.address.startswith(("dns:", "unix:"))

    def proxy(self, encrypted: bool) -> str | None:
        """The proxy's URL by the environment; never one for this machine itself."""
        if not self.host or _is_here(self.host):
            return None
        proxies = getproxies_environment()
        if self.protocol == "grpc":  # gRPC reads these itself, in this order and in small letters only
            bypass = next((os.environ[name] for name in ("no_grpc_proxy", "no_proxy") if os.environ.get(name)), "")
            names = ("grpc_proxy", "https_proxy", "http_proxy")
            proxy = next((os.environ[name] for name in names if os.environ.get(name)), None)
            return None if _is_bypassed(self.host, bypass) else proxy
        proxy = proxies.get("https" if encrypted else "http") or proxies.get("all")
        if not proxy or _is_bypassed(self.host, proxies.get("no", "")):
            return None
        proxy = proxy if "://" in proxy else f"http://{proxy}"
        if urlsplit(proxy).scheme != "http" or not urlsplit(proxy).hostname:
            raise InvalidInputError(
                f"the environment names the proxy {_without_password(proxy)}, which is no http:// proxy",
                fix=f"name one, or add {self.host} to no_proxy",
            )
        return proxy


def _is_here(host: str) -> bool:
    """Whether the host's name or address means this machine."""
    name = host.strip("[]").rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_loopback or address.is_unspecified


def _is_bypassed(host: str, bypass: str) -> bool:
    """Whether `no_proxy` names the host: by its name, the end of its name, its number, or a network like 10.0.0.0/8."""
    host = host.strip("[]")
    if proxy_bypass_environment(host, {"no": bypass}):
        return True
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host)
        for each in bypass.split(","):
            with contextlib.suppress(ValueError):
                if "/" in each and address in ipaddress.ip_network(each.strip(), strict=False):
                    return True
    return False


def _without_password(url: str) -> str:
    return repr(re.sub(r"//[^/@]*@", "//...@", url))


def _headers(headers: Mapping[str, str], protocol: str) -> tuple[tuple[str, str], ...]:
    """The headers, checked. Their values are secrets and never part of a message."""
    if not isinstance(headers, Mapping):
        raise InvalidInputError(f"headers is of type {type(headers).__name__}", fix="give {name: value}")
    checked: Iterable[tuple[str, str]] = headers.items()
    for name, value in checked:
        if not isinstance(name, str) or not _HEADER_NAME.fullmatch(name) or name.lower() in _OWN_HEADERS:
            raise InvalidInputError(f"a header's name is {name!r}", fix="give a name such as Authorization")
        if not isinstance(value, str) or not value.isascii() or not value.isprintable():
            raise InvalidInputError(f"the value of header {name} is no printable ASCII text", fix="encode it")
        if protocol == "grpc" and not re.fullmatch(r"[a-z0-9_.-]+", name.lower()):
            raise InvalidInputError(f"gRPC takes no header {name!r}", fix="use letters, digits, '-', '_' and '.'")
        if protocol == "grpc" and name.lower().endswith("-bin"):
            raise InvalidInputError(f"header {name!r}: gRPC keeps -bin for bytes", fix="use another name")
    return tuple((name.lower() if protocol == "grpc" else name, value) for name, value in checked)
