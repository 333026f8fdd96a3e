"""The errors that people see: each says what happened, the likely cause and what to do.

Anything that derives from `SSDError` is printed without a traceback by `tasks/`; everything else is a bug.
"""

from __future__ import annotations


class SSDError(Exception):
    """What happened, why it likely did, and what to do about it.

    Args:
        what: one sentence with the actual values in it.
        why: the likely cause, where it is not plain from `what`.
        fix: what the reader can do now.
    """

    def __init__(self, what: str, *, why: str = "", fix: str = "") -> None:
        self.what, self.why, self.fix = what, why, fix
        super().__init__(
            "\n".join(filter(None, [what, why and f"likely because: {why}", fix and f"what to do: {fix}"]))
        )


class SpecError(SSDError):
    """A spec.toml (or a file that it names) is missing, unreadable or wrong."""


class GraphError(SSDError):
    """An ONNX model is corrupt or is not what its spec says."""


class DataError(SSDError):
    """Pictures or their labels are missing, unreadable or do not fit the model."""


class QuantizeError(SSDError):
    """A graph cannot be quantised or converted as asked, or its calibration does not fit it."""


class OptionError(SSDError):
    """A task was given a value that it does not know."""


class RuntimeUnavailableError(SSDError):
    """The chosen runtime cannot be used on this machine."""


class EngineError(SSDError):
    """A TensorRT engine could not be built, read or run."""


class VerifyError(SSDError):
    """A built model failed its gate, or could not be put to it; nothing was published."""


class PublishError(SSDError):
    """The model repository could not be written; what was published before is untouched."""


class ImportModelError(SSDError):
    """A model cannot be imported; nothing was written."""


class WriteError(SSDError):
    """A file could not be written; it is as it was."""


class ServeError(SSDError):
    """tritonserver is missing, did not come up, or went away."""
