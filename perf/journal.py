"""The journal of a run: every measurement by its key, one JSON line each, on disk before the next one starts.

    journal = Journal(Path("artifacts/perf/2026-11-22T15-00-00/points.jsonl"))
    result = journal.measure({"series": "ratio", "repeat": 0}, lambda: {"throughput": 190.0})

A resumed run runs the same code again and reads back every measurement that is already in the journal. So what is
measured next must depend on earlier results alone, as in a binary search.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


class Journal:
    """Measurements by key; those of an earlier run in the same file count as done.

    A line that cannot be read, such as one that was cut off when the run was killed, counts as not measured.

    Args:
        path: the JSON-lines file; made where it is not there. None = nothing is kept.
        before: called with the key of each measurement that is about to be made.
        where: of all measurements, such as the machine and its versions: what was measured elsewhere does not count.
    """

    def __init__(
        self,
        path: Path | None = None,
        before: Callable[[Mapping[str, Any]], None] = lambda key: None,
        where: Mapping[str, Any] | None = None,
    ) -> None:
        self._path, self._before = path, before
        self._where = hashlib.sha256(_name(where or {}).encode()).hexdigest()[:12]
        self._done: dict[str, dict[str, Any]] = {}
        self.reused = 0
        if path is None or not path.is_file():
            return
        whole = path.read_text(errors="replace")
        for line in whole.splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                if entry["where"] == self._where:
                    self._done[_name(entry["key"])] = entry["result"]
        if not whole.endswith("\n"):
            path.write_text(f"{whole}\n")

    def measure(
        self,
        key: Mapping[str, Any],
        function: Callable[[], Mapping[str, Any]],
        counts: Callable[[dict[str, Any]], bool] = lambda result: True,
    ) -> dict[str, Any]:
        """The result under `key`, measured by `function` where it is not there yet.

        What `function` raises is noted and passed on; the key stays to be measured.

        Args:
            key: what tells this measurement from others; JSON.
            function: measures.
            counts: whether a result that an earlier run left may be taken, or is to be measured again.
        """
        name = _name(key)
        if name in self._done and counts(self._done[name]):
            self.reused += 1
            return self._done[name]
        self._before(key)
        started = time.monotonic()
        try:
            result = dict(function())
        except Exception as error:
            self._append({"key": dict(key), "error": str(error)}, started)
            raise
        self._append({"key": dict(key), "result": result}, started)
        # As it will be read back: a resumed run sees the very same values.
        self._done[name] = json.loads(json.dumps(result))
        return self._done[name]

    def _append(self, entry: dict[str, Any], started: float) -> None:
        if self._path is None:
            return
        entry |= {"where": self._where, "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        with self._path.open("a") as file:
            file.write(json.dumps({**entry, "seconds": round(time.monotonic() - started, 3)}) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _name(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)
