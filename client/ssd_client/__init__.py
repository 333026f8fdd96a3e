"""Client of detectors that SSD on Triton serves.

from ssd_client import SSDClient

with SSDClient("localhost:8001", model="shapes") as client:
    detections = client.detect("street.jpg")
"""

from .client import AsyncSSDClient, SSDClient
from .config import ModelConfig
from .detections import Detections
from .exceptions import (
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
from .transport import TLS

__version__ = "0.1.0"
__all__ = [
    "TLS",
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
