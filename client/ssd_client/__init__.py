"""Client of detectors that SSD on Triton serves.

from ssd_client import SSDClient

with SSDClient("localhost:8001", model="shapes") as client:
    detections = client.detect("street.jpg")

Names are imported when they are first used. `ssd_client.preprocess` alone therefore needs only NumPy and Pillow.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .client import AsyncSSDClient, SSDClient
    from .config import ModelConfig
    from .detections import Detections
    from .endpoint import TLS
    from .exceptions import (
        AccessDeniedError,
        ImageError,
        InferenceError,
        InvalidInputError,
        ModelConfigError,
        ModelNotFoundError,
        ModelNotReadyError,
        RequestTimeoutError,
        ServerUnavailableError,
        SharedMemoryError,
        SSDClientError,
    )
    from .preprocess import ImageSource

__version__ = "0.1.0"
__all__ = [
    "TLS",
    "AccessDeniedError",
    "AsyncSSDClient",
    "Detections",
    "ImageError",
    "ImageSource",
    "InferenceError",
    "InvalidInputError",
    "ModelConfig",
    "ModelConfigError",
    "ModelNotFoundError",
    "ModelNotReadyError",
    "RequestTimeoutError",
    "SSDClient",
    "SSDClientError",
    "ServerUnavailableError",
    "SharedMemoryError",
]

_MODULES = {
    "TLS": "endpoint",
    "AsyncSSDClient": "client",
    "Detections": "detections",
    "ImageSource": "preprocess",
    "ModelConfig": "config",
    "SSDClient": "client",
}  # every other name is an error


if not TYPE_CHECKING:  # a type checker would take every name for one of the module's

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_MODULES.get(name, 'exceptions')}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
