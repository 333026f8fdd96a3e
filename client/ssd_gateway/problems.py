"""Errors as `application/problem+json` (RFC 9457), with the words of the client library."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from http import HTTPStatus

from aiohttp import web
from PIL import Image
from ssd_client import exceptions as sdk
from ssd_client.preprocess import FORMATS

CONTENT_TYPE = "application/problem+json"
# The first that fits counts.
_STATUSES: tuple[tuple[type[sdk.SSDClientError], int], ...] = (
    (sdk.ModelNotReadyError, 503),
    (sdk.ModelNotFoundError, 404),
    (sdk.ServerUnavailableError, 503),
    (sdk.RequestTimeoutError, 504),
    (sdk.AccessDeniedError, 502),  # the gateway's own headers are at fault, not its caller's: no 401, no 403
    (sdk.InvalidInputError, 422),  # a threshold that this model cannot take
)
_FAILED_BEHIND_US = 502


class ProblemError(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        detail: what happened, likely why, and what to do.
        headers: of the answer.
    """

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, dict(headers or {})

    def response(self) -> web.Response:
        """The answer."""
        title = HTTPStatus(self.status).phrase
        problem = {"type": "about:blank", "title": title, "status": self.status, "detail": self.detail}
        return web.Response(
            text=json.dumps(problem, ensure_ascii=False),
            status=self.status,
            content_type=CONTENT_TYPE,
            headers=self.headers,
        )


def problem_of(error: sdk.SSDClientError) -> ProblemError:
    """The answer for an error of the client library that does not come from the picture itself."""
    status = next((status for kind, status in _STATUSES if isinstance(error, kind)), _FAILED_BEHIND_US)
    return ProblemError(status, str(error), {"Retry-After": "1"} if status == 503 else None)


def picture_problem(error: sdk.ImageError, body: bytes, max_pixels: int) -> ProblemError:
    """The answer for a picture that could not be read: no picture (415), too large (413) or damaged (422)."""
    try:
        with Image.open(io.BytesIO(body), formats=[name for name in FORMATS if name in Image.OPEN]) as image:
            status = 413 if image.width * image.height > max_pixels else 422
    except Exception:  # whatever Pillow makes of it, its header is none of a picture
        status = 415
    return ProblemError(status, str(error))
