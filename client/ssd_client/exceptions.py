"""The errors of this package. Each message states what happened, the likely cause and what to do."""

from __future__ import annotations

from .text import escaped


class SSDClientError(Exception):
    """Base of everything that this package raises on purpose.

    Characters of file names and of a server's words that would disturb a terminal are escaped.

    Args:
        what: one sentence with the actual values in it.
        why: the likely cause, where it is not plain from `what`.
        fix: what the reader can do now.
    """

    def __init__(self, what: str, *, why: str = "", fix: str = "") -> None:
        parts = (what, why and f"likely because: {why}", fix and f"what to do: {fix}")
        super().__init__(escaped("\n".join(filter(None, parts)), keep="\n"))


class InvalidInputError(SSDClientError, ValueError):
    """An argument is wrong: a shape, a type, a threshold, a batch that is too large."""


class ImageError(InvalidInputError):
    """A picture cannot be read or is not one."""


class ServerUnavailableError(SSDClientError, ConnectionError):
    """No server answers, the connection broke, or the server cannot take requests now."""


class RequestTimeoutError(SSDClientError, TimeoutError):
    """The answer did not come before the deadline."""


class AccessDeniedError(SSDClientError, PermissionError):
    """The server, or what stands before it, does not let this client in."""


class ModelNotFoundError(SSDClientError):
    """The server does not have that model."""


class ModelNotReadyError(ModelNotFoundError):
    """The server knows the model, but no version of it is loaded, or not yet."""


class ModelConfigError(SSDClientError):
    """The model's configuration lacks a parameter, has a wrong one, or follows another version of the contract."""


class InferenceError(SSDClientError):
    """The server answered a request with an error, or with something that breaks the contract."""


class SharedMemoryError(SSDClientError):
    """System shared memory could not be made here, or the server does not take it."""
