"""Puts this project's Triton backend into a backend folder, for images and for servers whose repository is on S3.

python -m deploy.backends /opt/ssd/backends
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from build.publish import backend


def install(folder: Path) -> Path:
    """Compiles the backend if need be and puts it, with ONNX Runtime's library, into `folder`/ssd_onnxruntime/.

    Args:
        folder: what tritonserver gets as --backend-directory.

    Returns:
        `folder`.

    Raises:
        RuntimeUnavailableError: it cannot be compiled here.
    """
    libraries = backend.prepare(backend.NATIVE).files
    if not libraries:  # it is installed into a folder of backends, and so straight into this one
        backend.prepare(backend.NATIVE, folder)
    place = folder / backend.NATIVE
    place.mkdir(parents=True, exist_ok=True)
    for name, path in libraries.items():
        shutil.copy2(path, place / name)
    return folder


if __name__ == "__main__":
    print(install(Path(sys.argv[1])))
