"""Why perf_analyzer gave no figures: what it printed → an error with the cause and the fix."""

from __future__ import annotations

import re

from perf.load import Load, PerfError


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
        r"version `(GLIBC\S*)' not found",
        "it needs {0}, newer than this machine's C library",
        "use the perf_analyzer of requirements/perf_analyzer.lock, or NVIDIA's SDK container",
    ),
    (
        r"(?:unrecognized|invalid) option -*\s*'?([\w-]+)",
        "this version of perf_analyzer does not know the option {0}",
        "use the one of requirements/perf_analyzer.lock",
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
        r"unknown model: '([^\n]*) is not found",
        "the server does not serve '{0}",
        "publish it first: invoke build-engines",
    ),
    (
        r"shape of (\[[\d,]*\]) for input \"(\w+)\" is incompatible with the model's input shape of (\[[-\d,]*\])",
        "the load's {1} are {0}, the model takes {2}",
        "bring the pictures to the model's size before write_input (ssd_client.preprocess.input_array)",
    ),
    (r"missing tensor (\w+)", "the load has no {0}, which is an input of the model", "give write_input its thresholds"),
    (
        r"batch-size must be <= (\d+)",
        "the model takes at most {0} images in a request",
        "ask for smaller batches, or raise max_batch_size in its spec.toml",
    ),
    (
        r"[Ss]hared memory is disabled",
        "the server does not allow clients to use shared memory",
        "start it with --allow-client-shm=true (invoke serve does), or measure without",
    ),
    (
        r"Unable to open shared memory region",
        "the server does not see this memory: it runs on another machine, or in a container of its own",
        "measure on the server's machine (docker: --ipc=host), or without shared memory",
    ),
    (
        r"on gpu for|[Cc]uda|CUDA",
        "CUDA shared memory needs an NVIDIA GPU with a driver for CUDA 12, and the server on the same GPU",
        "use system shared memory",
    ),
    (
        r"(?s)Measurement Settings .*(?:connect to|reset by peer|Socket closed|HTTP client failed|is empty)",
        "the server went away while it was measured",
        "see its log (artifacts/logs/tritonserver.log); start it again: invoke serve",
    ),
    (
        r"[Ff]ailed to connect to remote host|Couldn't connect|Connection refused|[Rr]esol(?:ve host|ution failed)",
        "no server answers there",
        "start one: invoke serve",
    ),
    (
        r"metadata: (?:failed to connect to all addresses|HTTP client failed|failed to parse|.*[Uu]nimplemented)",
        "what listens there does not speak Triton's {protocol}",
        "give the server's {protocol} port (invoke serve shows both)",
    ),
    (r"Thread \[\d+\] had error: ([^\n]*)", "a request failed: {0}", "see the server's log"),
)
_NOTHING_ENDED = "No valid requests recorded|Failed to obtain stable|failed to find the requested model version"


def failure(output: str, code: int, url: str, model: str, load: Load) -> PerfError:
    """The error of a run that gave no figures.

    Args:
        output: what it printed.
        code: its exit code; that of a signal is negative.
        url, model, load: as for `perf.analyzer.run`.
    """
    ended = f"exit code {code}" if code >= 0 else f"ended by signal {-code}"
    lines = [
        line.strip() for line in output.split("Usage: ")[0].splitlines() if not re.match(r"\s*$|Unable to un", line)
    ]
    what = "\n  ".join([f"perf_analyzer gave no figures for model {model} at {url} ({ended})", *lines[-5:]])
    for pattern, why, fix in _CAUSES:
        match = re.search(pattern, f"{output}\n{ended}")
        if match:
            protocol = "HTTP" if load.protocol == "http" else "gRPC"
            return PerfError(
                what, why=why.format(*match.groups(), protocol=protocol), fix=fix.format(protocol=protocol)
            )
    if re.search(_NOTHING_ENDED, output):
        return NothingEndedError(
            what, why="no request ended in time: the server is too busy, or hangs", fix="see what else runs there"
        )
    return PerfError(what)
