"""The web application: routes, checks and answers. Decoding and asking Triton happen in a thread pool."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import io
import logging
import re
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.message import Message
from email.parser import BytesHeaderParser
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from aiohttp import web
from PIL import Image
from ssd_client import Detections
from ssd_client.exceptions import ImageError, SSDClientError
from ssd_client.preprocess import load_image

from . import openapi
from .metrics import CONTENT_TYPE as METRICS_TYPE
from .metrics import Metrics
from .models import Models, describe
from .problems import ProblemError, picture_problem, problem_of
from .settings import Settings

PAGE = Path(__file__).with_name("page.html")
SETTINGS: web.AppKey[Settings] = web.AppKey("settings", Settings)
# What every answer carries. The page alone gets a policy of its own.
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_DRAWN = {"image/jpeg": ("JPEG", {"quality": 90}), "image/png": ("PNG", {"compress_level": 1})}
_QUERY = ("model", "score_threshold", "iou_threshold")
_MOST_PARTS = 100  # of a form, before its file
_LONGEST_BOUNDARY = 70  # RFC 2046, section 5.1.1
_LONGEST_PART_HEADER = 16_384  # bytes
_NEED_TOKEN = ("/detect", "/info", "/metrics")
_log = logging.getLogger("ssd_gateway")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class _Wish:
    """What a request to /detect asks for beside its picture."""

    model: str
    score: float | None
    iou: float | None
    media_type: str


class Gateway:
    """The routes of one worker.

    Args:
        settings: how it works.
        begun: is called with the connection of every request whose header arrived.
    """

    def __init__(self, settings: Settings, begun: Callable[[Any], None] = lambda connection: None) -> None:
        self._settings, self._begun = settings, begun
        self._models = Models(settings)
        self._metrics = Metrics()
        self._threads = ThreadPoolExecutor(settings.threads, "ssd_gateway")
        self._in_hand = 0
        self._description = openapi.describe(settings)
        self._page = PAGE.read_text(encoding="utf-8-sig")
        self._page_policy = policy_of(self._page)

    def app(self) -> web.Application:
        """The application for aiohttp."""
        app = web.Application(middlewares=[self._answer], client_max_size=self._settings.max_bytes)
        app[SETTINGS] = self._settings
        app.add_routes(
            [
                web.get("/", self._show_page),
                web.post("/detect", self._detect),
                web.get("/info", self._info),
                web.get("/healthz", self._healthz),
                web.get("/metrics", self._show_metrics),
                web.get("/openapi.json", self._openapi),
            ]
        )
        app.on_cleanup.append(self._close)
        return app

    async def _close(self, app: web.Application) -> None:
        await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)
        await asyncio.to_thread(self._models.close)

    @web.middleware
    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """What all routes share: who may ask, errors as problems, headers, metrics."""
        self._begun(request.protocol)
        started = time.perf_counter()
        resource = request.match_info.route.resource
        route = resource.canonical if resource is not None else "other"
        response: web.StreamResponse
        try:
            self._admit(request)
            response = await handler(request)
        except ProblemError as problem:
            response = problem.response()
        except SSDClientError as error:
            response = problem_of(error).response()
        except web.HTTPRequestEntityTooLarge:
            response = self._too_large().response()
        except web.HTTPException as error:  # aiohttp's own: no such path, another method
            headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else None
            detail = f"{request.method} {request.path}: {error.reason}\nwhat to do: see /openapi.json"
            response = ProblemError(error.status, detail, headers).response()
        except ConnectionError:  # the caller went away
            response = ProblemError(400, "the connection broke before the whole request was here").response()
        except Exception:
            _log.exception("%s %s", request.method, request.path)
            response = ProblemError(500, "a fault in the gateway; its log has the details").response()
        for name, value in _HEADERS.items():
            response.headers.setdefault(name, value)
        method = request.method if request.method in ("GET", "HEAD", "POST") else "other"
        self._metrics.requests.labels(route, method, response.status).inc()
        self._metrics.seconds.labels(route).observe(time.perf_counter() - started)
        return response

    def _admit(self, request: web.Request) -> None:
        """Refuse pages of other origins, names that are not ours, and callers without the token."""
        hosts = self._settings.hosts
        name = _split(f"//{request.host}").hostname or ""
        if hosts and name not in hosts:
            raise ProblemError(
                403,
                f"this gateway is not called {name!r}; its names are {', '.join(hosts)}\n"
                "what to do: use one of them, or start it with --allow-host",
            )
        origin = request.headers.get("Origin")
        if origin is not None and _split(origin).netloc != request.host:
            raise ProblemError(
                403, f"pages of {origin} may not use this gateway\nwhat to do: open the gateway's own page"
            )
        # Browsers leave Origin out where a page embeds an address, such as <img src>, and where a link is followed.
        if request.headers.get("Sec-Fetch-Site") in ("cross-site", "same-site") and (
            request.path != "/" or request.headers.get("Sec-Fetch-Mode") != "navigate"
        ):
            raise ProblemError(403, "pages of others may not use this gateway\nwhat to do: open the gateway's own page")
        token = self._settings.token
        if token and request.path in _NEED_TOKEN:
            given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
            if not hmac.compare_digest(given, f"Bearer {token}".encode()):
                raise ProblemError(
                    401,
                    "the token is missing or wrong\nwhat to do: send the header Authorization: Bearer TOKEN",
                    {"WWW-Authenticate": "Bearer"},
                )

    async def _show_page(self, request: web.Request) -> web.Response:
        headers = {"Content-Security-Policy": self._page_policy, "Permissions-Policy": "camera=(self), microphone=()"}
        return web.Response(text=self._page, content_type="text/html", charset="utf-8", headers=headers)

    async def _openapi(self, request: web.Request) -> web.Response:
        return web.json_response(self._description)

    async def _show_metrics(self, request: web.Request) -> web.Response:
        headers = {"Content-Type": f"{METRICS_TYPE}; charset=utf-8"}
        return web.Response(body=await asyncio.to_thread(self._metrics.text), headers=headers)

    async def _info(self, request: web.Request) -> web.Response:
        served = await asyncio.to_thread(self._models.served)
        return web.json_response(
            {
                "default_model": self._models.default(served),
                "max_bytes": self._settings.max_bytes,
                "max_pixels": self._settings.max_pixels,
                "models": describe(served),
            }
        )

    async def _healthz(self, request: web.Request) -> web.Response:
        await asyncio.to_thread(self._models.choose, "")
        return web.json_response({"status": "ok"})

    async def _detect(self, request: web.Request) -> web.Response:
        started = time.perf_counter()
        wish = _wish_of(request)
        self._check_body(request)
        if self._in_hand >= self._settings.max_requests:
            raise ProblemError(
                429,
                f"{self._in_hand} pictures are in hand, which is the most\nwhat to do: wait a moment, ask again",
                {"Retry-After": "1"},
            )
        self._in_hand += 1
        self._metrics.in_hand.inc()
        try:
            body = await self._read(request)
            read = time.perf_counter()
            work = asyncio.get_running_loop().run_in_executor(self._threads, self._work, body, wish, started, read)
            limit = 2 * self._settings.timeout + self._settings.read_timeout  # in the queue, and on its way
            try:
                return await asyncio.wait_for(work, limit)
            except SSDClientError:  # one of them is a TimeoutError, too
                raise
            except asyncio.TimeoutError:
                raise ProblemError(
                    504, f"no answer within {limit:.3g} s\nwhat to do: send fewer requests at once"
                ) from None
        finally:
            self._in_hand -= 1
            self._metrics.in_hand.dec()

    def _check_body(self, request: web.Request) -> None:
        """What the header gives away about the body, before any of it is read."""
        encoding = request.headers.get("Content-Encoding", "identity").lower()
        if encoding != "identity":
            raise ProblemError(415, f"the body is encoded as {encoding[:50]!r}\nwhat to do: send it as it is")
        kind = request.content_type
        if not kind.startswith("image/") and kind not in ("application/octet-stream", "multipart/form-data"):
            raise ProblemError(
                415,
                f"the body is {kind[:100]!r}, not a picture\nwhat to do: send the file as image/*, as "
                "application/octet-stream, or in a form as multipart/form-data",
            )
        if (request.content_length or 0) > self._settings.max_bytes:
            raise self._too_large()
        if kind == "multipart/form-data" and request.content_length is None:
            raise ProblemError(
                411, "a form came without its length\nwhat to do: send Content-Length, or the file alone"
            )

    def _too_large(self) -> ProblemError:
        return ProblemError(
            413,
            f"the body has more than {self._settings.max_bytes} bytes\nwhat to do: make the picture smaller, or start "
            "the gateway with a larger --max-bytes",
        )

    async def _read(self, request: web.Request) -> bytes:
        seconds = self._settings.read_timeout
        try:
            body = await asyncio.wait_for(_body_of(request), seconds)
        except asyncio.TimeoutError:
            raise ProblemError(
                408, f"the body was not here after {seconds:.3g} s\nwhat to do: send a smaller picture", _GOODBYE
            ) from None
        if not body:
            raise ProblemError(400, "the body is empty\nwhat to do: send the bytes of a picture file")
        return body

    def _work(self, body: bytes, wish: _Wish, started: float, read: float) -> web.Response:
        """In a thread: decode, ask, and write the answer."""
        begun = time.perf_counter()
        model = self._models.choose(wish.model)
        try:
            image = load_image(body, max_pixels=self._settings.max_pixels)
        except ImageError as error:
            raise picture_problem(error, body, self._settings.max_pixels) from None
        decoded = time.perf_counter()
        detections = self._models.detect(model, image, wish.score, wish.iou)
        done = time.perf_counter()
        self._metrics.detections.labels(model.config.name).observe(len(detections))
        if wish.media_type in _DRAWN:
            return web.Response(body=_drawn(detections, image, wish.media_type), content_type=wish.media_type)
        times = {
            "read": read - started,
            "queue": begun - read,
            "decode": decoded - begun,
            "detect": done - decoded,
            "total": done - started,
        }
        answer = {
            "model": model.config.name,
            "version": model.version,
            "manifest_sha256": model.config.manifest_sha256,
            "image_size": list(detections.image_size),
            "detections": detections.to_dicts(),
            "timings_ms": {name: round(1000 * seconds, 3) for name, seconds in times.items()},
        }
        return web.json_response(answer)


_GOODBYE = {"Connection": "close"}


def policy_of(page: str) -> str:
    """The Content-Security-Policy under which a page may do what it does, and nothing else.

    Args:
        page: HTML with its style and script inside; only exactly these may run.
    """

    def hashes(tag: str) -> str:
        texts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.S)
        digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; "
        "img-src blob: data:; media-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _split(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError:  # brackets that do not close
        return urlsplit("")


def _wish_of(request: web.Request) -> _Wish:
    unknown = sorted(set(request.query) - set(_QUERY))
    if unknown:
        raise ProblemError(
            400, f"/detect does not know {', '.join(unknown)[:200]}\nwhat to do: use {', '.join(_QUERY)}"
        )
    twice = sorted(name for name in set(request.query) if len(request.query.getall(name)) > 1)
    if twice:
        raise ProblemError(400, f"{', '.join(twice)} is given more than once\nwhat to do: give one value")
    accepted = request.headers.get("Accept", "").lower()
    media_type = next((kind for kind in openapi.PICTURE_TYPES if kind in accepted), "application/json")
    return _Wish(
        request.query.get("model", ""),
        _fraction(request, "score_threshold"),
        _fraction(request, "iou_threshold"),
        media_type,
    )


def _fraction(request: web.Request, name: str) -> float | None:
    text = request.query.get(name)
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:  # false for NaN, too
        raise ProblemError(400, f"{name} is {text[:50]!r}\nwhat to do: give a number in 0..1")
    return value


async def _body_of(request: web.Request) -> bytes:
    """The picture file in a request: the body, or the first file of a form."""
    body = await request.read()
    return _file_of(body, request.headers["Content-Type"]) if request.content_type == "multipart/form-data" else body


def _file_of(form: bytes, content_type: str) -> bytes:
    """The first file of a form (RFC 7578): the content of the first part that has a file name.

    aiohttp's own reader goes through a form line by line in the event loop: 10 MB of tiny parts stopped it for 17 s.

    Raises:
        ProblemError: the form is damaged, has too many parts, or has no file.
    """
    about = Message()
    about["Content-Type"] = content_type if content_type.isascii() else ""
    boundary = about.get_boundary("")
    if not 0 < len(boundary) <= _LONGEST_BOUNDARY:
        raise _bad_form(f"its header names no boundary of at most {_LONGEST_BOUNDARY} ASCII characters")
    mark = b"\r\n--" + boundary.encode()
    end = -2 if form.startswith(mark[2:]) else form.find(mark)
    for _ in range(_MOST_PARTS):
        start = end + len(mark)
        if end == -1 or form.startswith(b"--", start):
            break
        end = form.find(mark, start)
        header = form.find(b"\r\n\r\n", start, min(end, start + _LONGEST_PART_HEADER))
        if end == -1 or header == -1:
            raise _bad_form("a part has no end, or a header that is too long")
        if BytesHeaderParser().parsebytes(form[start:header].lstrip()).get_filename() is not None:
            return form[header + 4 : end]
    else:
        raise _bad_form(f"its first {_MOST_PARTS} parts are no files")
    raise ProblemError(400, 'the form has no file\nwhat to do: curl -F "image=@picture.jpg" sends one')


def _bad_form(reason: str) -> ProblemError:
    return ProblemError(400, f"the form cannot be read: {reason}\nwhat to do: send the file as the body instead")


def _drawn(detections: Detections, image: Image.Image, media_type: str) -> bytes:
    kind, options = _DRAWN[media_type]
    stream = io.BytesIO()
    detections.draw(image).save(stream, kind, **options)
    return stream.getvalue()
