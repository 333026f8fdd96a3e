"""Why perf_analyzer gave no figures: what it printed → an error with the cause and the fix."""

from __future__ import annotations

import re

from perf.load import PerfError


class NothingEndedError(PerfError):
    """Not one request ended in a window."""


# First match wins: what perf_analyzer prints, why it is so, what to do about it. {0} is what the first group caught.
_CAUSES = (
    (
        r"error while loading shared libraries: (\S+?):",
        "{0} is not on this machine",
        "install nvidia-pytriton, which carries it: run through ./invoke",
    ),
    (
        r"std::bad_alloc|std::system_error|Cannot allocate memory|ended by signal 9",
        "there was no more memory for it: without shared memory it keeps the bytes of every request",
        "use shared memory, a shorter run or smaller batches",
    ),
    (
        r"ended by signal 7",  # SIGBUS: a file in /dev/shm takes its space only when it is written
        "/dev/shm is full: it holds every picture once for each place in a batch",
        "make /dev/shm larger (docker: --shm-size=1g), or use fewer pictures or smaller batches",
    ),
    (
        r"(?s)Measurement Settings .*(?:connect to|reset by peer|Socket closed|HTTP client failed|is empty)",
        "the server went away while it was measured",
        "see its log (artifacts/logs/tritonserver.log); start it again: invoke serve",
    ),
    (
        r"[Ff]ailed to connect to (?:remote host|all addresses)|Couldn't connect|Connection refused",
        "no server answers there",
        "start one: invoke serve",
    ),
    (r"Thread \[\d+\] had error: ([^\n]*)", "a request failed: {0}", "see the server's log"),
)
_NOTHING_ENDED = "No valid requests recorded|Failed to obtain stable|failed to find the requested model version"


def failure(output: str, code: int, url: str, model: str) -> PerfError:
    """The error of a run that gave no figures.

    Args:
        output: what it printed.
        code: its exit code; that of a signal is negative.
        url, model: as for `perf.analyzer.run`.
    """
    ended = f"exit code {code}" if code >= 0 else f"ended by signal {-code}"
    printed = output.split("Usage: ")[0].splitlines()
    lines = [line.strip() for line in printed if not re.match(r"\s*$|Unable to un", line)]
    what = "\n  ".join([f"perf_analyzer gave no figures for model {model} at {url} ({ended})", *lines[-5:]])
    for pattern, why, fix in _CAUSES:
        match = re.search(pattern, f"{output}\n{ended}")
        if match:
            return PerfError(what, why=why.format(*match.groups()), fix=fix)
    if re.search(_NOTHING_ENDED, output):
        why = "no request ended in time: the server is too busy, or hangs"
        return NothingEndedError(what, why=why, fix="see what else runs there")
    return PerfError(what)
