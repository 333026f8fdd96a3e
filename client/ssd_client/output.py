"""Files that a command writes for its user."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that appears at `path` whole or not at all; its folder is made.

    Behind a link, the file that it names is replaced. What is no regular file, such as /dev/null or a named pipe, is
    written to directly: renaming a file over it would destroy it.

    Raises:
        OSError: the operating system refuses.
    """
    if path.exists() and not path.is_file():
        with path.open("wb") as stream:
            yield stream
        return
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name[:50]}.{uuid.uuid4().hex[:8]}")
    try:
        with part.open("xb") as stream:
            yield stream
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
