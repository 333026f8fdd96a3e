"""MLPerf's four scenarios on a running server: LoadGen in a child process with a deadline, and what its logs say.

    served = Served(server.http_url, "shapes", config, pictures, Path("artifacts/datasets/..."))
    result = run(served, "single-stream", folder, seconds=20, pace=pace(served))
    result["valid"], result["figures"], result["problems"]

The bounds are those of the MLPerf Inference Rules (github.com/mlcommons/inference_policies, inference_rules.adoc,
commit 848b9ab, sections 3 and 5.1) for SSD. Runs are shorter than the rules ask for: docs/perf.md, "LoadGen".
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build.errors import OptionError
from build.files import ROOT
from build.gate.scoring import CURVE_THRESHOLD
from perf.mlperf.child import OUTCOME, REQUEST, STOPPED, Request

if TYPE_CHECKING:
    from ssd_client.config import ModelConfig

PROGRAM = (sys.executable, "-m", "perf.mlperf.child")
SUMMARY, DETAIL, ACCURACY = "mlperf_log_summary.txt", "mlperf_log_detail.txt", "mlperf_log_accuracy.json"
LOGS = (SUMMARY, DETAIL, ACCURACY, "mlperf_log_trace.json")
BOUND_MS = 100.0  # the rules' bound on the p99 of the server scenario for SSD
SAMPLES_PER_QUERY = 8  # of multi-stream
IN_MEMORY = 256  # pictures of a performance run
SHARE_LOGGED = 0.1  # of a performance run's answers that LoadGen logs, as MLPerf's compliance test TEST01 has it
SHARE_OFFERED = 0.6  # of what several clients get: the server scenario's rate where none is given
NULL_QUERIES = 2000
_GRACE_S = 30.0  # that a run may take beside its measurement
_STOP_S = 5.0


@dataclass(frozen=True)
class Scenario:
    """How a scenario is run here.

    Attributes:
        member: of LoadGen's TestScenario.
        metric: what it is about, in words.
        queries: the fewest of a run that LoadGen can call VALID.
        workers, batch: as for `Request`.
        rules: what a submission would need besides.
    """

    member: str
    metric: str
    queries: int
    workers: int
    batch: int
    rules: str


SCENARIOS = {
    "single-stream": Scenario("SingleStream", "p90 latency", 64, 0, 1, "600 s"),
    "multi-stream": Scenario("MultiStream", "p99 latency of 8", 662, 2, 8, "600 s"),
    "server": Scenario("Server", "queries/s, p99 within a bound", 1000, 16, 1, "600 s, p99 within 100 ms"),
    "offline": Scenario("Offline", "throughput", 1, 4, 8, "600 s and 24,576 samples"),
}


@dataclass(frozen=True)
class Served:
    """A model on a running server, and the pictures to ask it about.

    Attributes:
        url: of the endpoint that belongs to `protocol`.
        config: the model's, as the server tells it.
        pictures: files in the order of the ground truth.
        protocol, shared_memory: how pictures reach the server.
        timeout: seconds after which a request counts as failed.
        program: the child's command line, without its folder.
    """

    url: str
    config: ModelConfig
    pictures: Sequence[Path]
    protocol: str = "http"
    shared_memory: str | None = "system"
    timeout: float = 10.0
    program: Sequence[str] = PROGRAM

    @property
    def score_threshold(self) -> float | None:
        """What every request asks for: the whole precision-recall curve, in all modes, as the rules want it."""
        return CURVE_THRESHOLD if self.config.runtime_thresholds else None

    def request(self, scenario: str, settings: Mapping[str, Any], **changed: Any) -> Request:
        """What a child needs to run a scenario with these fields of TestSettings."""
        how = SCENARIOS[scenario]
        values: dict[str, Any] = {
            "settings": {"scenario": how.member, "mode": "PerformanceOnly", **settings},
            "pictures": [str(path) for path in self.pictures],
            "rule": asdict(self.config.preprocessing),
            "in_memory": IN_MEMORY,
            "model": self.config.name,
            "url": self.url,
            "protocol": self.protocol,
            "shared_memory": self.shared_memory,
            "timeout": self.timeout,
            "score_threshold": self.score_threshold,
            "workers": how.workers,
            "batch": min(how.batch, self.config.max_batch_size),
        }
        return Request(**{**values, **changed})


@dataclass(frozen=True)
class Pace:
    """About how fast a server is: LoadGen plans its queries by this.

    Attributes:
        latency_ms: of one request alone.
        images_per_second: of several clients that send batches.
    """

    latency_ms: float
    images_per_second: float


def pace(served: Served, seconds: float = 1.0) -> Pace:
    """Measures it, which also warms the server up.

    Raises:
        SSDClientError: the server does not answer.
    """
    import numpy as np
    from ssd_client import SSDClient
    from ssd_client.preprocess import input_array

    images = np.stack([input_array(str(path), served.config.preprocessing)[0] for path in served.pictures[:8]])
    how, done = SCENARIOS["offline"], [0] * SCENARIOS["offline"].workers
    images = images[: served.config.max_batch_size]
    protocol, memory = served.protocol, served.shared_memory
    with SSDClient(served.url, model=served.config.name, protocol=protocol, shared_memory=memory) as client:  # type: ignore[arg-type]
        times: list[float] = []
        deadline = time.perf_counter() + seconds / 2
        while len(times) < 5 or time.perf_counter() < deadline:
            begun = time.perf_counter()
            client.infer(images[:1], served.score_threshold)
            times.append(time.perf_counter() - begun)

        def work(number: int) -> None:
            while time.perf_counter() < deadline:
                client.infer(images, served.score_threshold)
                done[number] += len(images)

        begun = time.perf_counter()
        deadline = begun + seconds
        threads = [threading.Thread(target=work, args=(number,)) for number in range(how.workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        whole = time.perf_counter() - begun
    return Pace(1000 * float(np.median(times)), max(1.0, sum(done) / whole))


def settings_of(
    scenario: str, pace: Pace, seconds: float, bound_ms: float = BOUND_MS, rate: float = 0.0
) -> tuple[dict[str, Any], float]:
    """Fields of TestSettings, and about how many seconds they make a run take.

    LoadGen makes its queries beforehand, as many as an expected latency or rate says; where that is too pessimistic
    the run ends early and is INVALID. So the expectations here are better than what was measured.

    Args:
        scenario: one of SCENARIOS.
        pace: of the server.
        seconds: of the run, at least; longer where so few queries would not be enough for LoadGen.
        bound_ms: of the server scenario's p99.
        rate: of the server scenario, queries/s; 0 = 60 % of the pace.
    """
    how = SCENARIOS[scenario]
    values: dict[str, Any] = {
        "min_duration_ms": round(seconds * 1000),
        "min_query_count": how.queries,
        "accuracy_log_probability": SHARE_LOGGED,
    }
    each = pace.latency_ms / 1000
    if scenario == "single-stream":
        values |= {"single_stream_expected_latency_ns": int(each / 2 * 1e9)}
    elif scenario == "multi-stream":
        each = SAMPLES_PER_QUERY / pace.images_per_second
        values |= {
            "multi_stream_expected_latency_ns": int(each / 2 * 1e9),
            "multi_stream_samples_per_query": SAMPLES_PER_QUERY,
        }
    elif scenario == "server":
        rate = rate or float(f"{SHARE_OFFERED * pace.images_per_second:.3g}")
        each = 1 / rate
        # Beyond that many at once the rate is lost: LoadGen stops instead of waiting for a queue without end.
        waiting = max(100, round(2 * rate * max(1.0, bound_ms / 1000)))
        values |= {
            "server_target_qps": rate,
            "server_target_latency_ns": round(bound_ms * 1e6),
            "server_max_async_queries": waiting,
        }
    else:
        values |= {"offline_expected_qps": 1.4 * pace.images_per_second}  # so many samples that the run is long enough
        return values, seconds * 1.6
    return values, max(seconds, how.queries * each)


def run(
    served: Served,
    scenario: str,
    folder: Path,
    *,
    seconds: float,
    pace: Pace,
    bound_ms: float = BOUND_MS,
    rate: float = 0.0,
    mode: str = "PerformanceOnly",
    null: bool = False,
) -> dict[str, Any]:
    """One run of LoadGen, with its logs in `folder`.

    Args:
        served, seconds, pace, bound_ms, rate: as for `settings_of`.
        scenario: one of SCENARIOS.
        folder: made where it is not there; logs of an earlier run in it are replaced.
        mode: of LoadGen's TestMode: PerformanceOnly, AccuracyOnly or FindPeakPerformance.
        null: answer at once instead of asking the server: what LoadGen and the client's process cost.

    Returns:
        `scenario`, `mode`; `loadgen` (VALID, INVALID or empty); `valid`: it is VALID and nothing else is wrong;
        `problems`, a sentence each; `figures` {p50_ms, p90_ms, p99_ms, max_ms, samples_per_second, rate, bound_ms,
        early_stopping_ms (what MLPerf reports of a latency: an upper bound of the percentile with 99 % confidence), as
        far as the scenario has them}; `queries`; `answered` and `failed` (samples); `exit_code` (None where it had to
        be killed); `seconds`; `log`, the first lines of LoadGen's summary.

    Raises:
        OptionError: there is no such scenario.
        KeyboardInterrupt: after the child was told to stop and has ended; its logs stay.
    """
    if scenario not in SCENARIOS:
        raise OptionError(f"there is no scenario {scenario!r}", fix=f"choose from {', '.join(SCENARIOS)}, all")
    values, expected = settings_of(scenario, pace, seconds, bound_ms, rate)
    if mode == "AccuracyOnly":
        expected = len(served.pictures) * pace.latency_ms / 1000
    elif mode == "FindPeakPerformance":
        expected *= 20
    changed: dict[str, Any] = {}
    if null:  # so many queries are answered in a moment; a trace of them would be large
        changed = {"url": "", "trace": False}
        values |= {"max_query_count": NULL_QUERIES, "min_query_count": 1}
    request = served.request(scenario, {**values, "mode": mode}, **changed)
    code, output = execute(request, folder, 3 * expected + served.timeout + _GRACE_S, served.program)
    outcome, entries = _outcome(folder), read_detail(folder / DETAIL)
    latest = {entry["key"]: entry["value"] for entry in entries}
    result = {
        "scenario": scenario,
        "mode": mode,
        "loadgen": latest.get("result_validity", ""),
        "figures": _figures(scenario, latest, bound_ms, values),
        "queries": int(latest.get("result_query_count", 0)),
        "answered": sum(count for _, _, count in outcome.get("answers", ())),
        "failed": sum(outcome.get("errors", {}).values()),
        "exit_code": code,
        "seconds": outcome.get("seconds"),
        "log": _log_lines(folder / SUMMARY),
    }
    problems = _problems(code, output, outcome, entries, latest, mode)
    return {**result, "problems": problems, "valid": not problems}


def execute(
    request: Request, folder: Path, deadline_s: float, program: Sequence[str] = PROGRAM
) -> tuple[int | None, str]:
    """Runs the child; its exit code, None where it had to be killed at its deadline, and the end of what it printed.

    Raises:
        KeyboardInterrupt: after the child has ended.
    """
    folder.mkdir(parents=True, exist_ok=True)  # LoadGen aborts where there is none
    for name in (*LOGS, OUTCOME, REQUEST):
        (folder / name).unlink(missing_ok=True)
    request.write(folder)
    process = subprocess.Popen(
        [*program, str(folder.resolve())],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C in a terminal is for this process alone
    )
    try:
        output, _ = process.communicate(timeout=deadline_s)
        return process.returncode, output[-2000:]
    except subprocess.TimeoutExpired:
        return None, _stop(process)
    except KeyboardInterrupt:
        _stop(process)
        raise


def _stop(process: subprocess.Popen[str]) -> str:
    """Tells the child to stop, which lets go of its shared memory; kills it where it does not."""
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.communicate(timeout=_STOP_S)[0][-2000:]
    process.kill()
    return process.communicate()[0][-2000:]


def read_detail(path: Path) -> list[dict[str, Any]]:
    """The entries of a mlperf_log_detail.txt, as far as it was written: {key, value, metadata {is_error, …}}."""
    entries = []
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):  # the last line of a run that was killed
                entries.append(json.loads(line.partition(" ")[2]))
    return entries


def _log_lines(path: Path) -> list[str]:
    """What LoadGen's summary says first: scenario, mode, figure, VALID or INVALID and why."""
    try:
        text = path.read_text(errors="replace")
    except FileNotFoundError:
        return []
    head = text.partition("Additional Stats")[0]
    return [line.rstrip() for line in head.splitlines() if ": " in line and "Recommend" not in line]


def _outcome(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / OUTCOME).read_text()))
    except (OSError, ValueError):
        return {}


def _figures(scenario: str, latest: Mapping[str, Any], bound_ms: float, values: Mapping[str, Any]) -> dict[str, float]:
    figures = {}
    percentiles = {"p50_ms": "50.00_percentile", "p90_ms": "90.00_percentile", "p99_ms": "99.00_percentile"}
    for name, key in {**percentiles, "max_ms": "max"}.items():
        # Of a query of 8 (multi-stream), else of a sample, which is a query then.
        latency = latest.get(f"result_{key}_per_query_latency_ns", latest.get(f"result_{key}_latency_ns"))
        if scenario != "offline" and latency is not None:
            figures[name] = latency / 1e6
    estimate = latest.get("early_stopping_latency_ss" if scenario == "single-stream" else "early_stopping_latency_ms")
    if estimate is not None and scenario in ("single-stream", "multi-stream"):
        figures["early_stopping_ms"] = estimate / 1e6
    if "result_samples_per_second" in latest:
        figures["samples_per_second"] = float(latest["result_samples_per_second"])
    if scenario == "server":
        figures |= {"rate": float(values["server_target_qps"]), "bound_ms": bound_ms}
        if "result_completed_samples_per_sec" in latest:
            figures["samples_per_second"] = float(latest["result_completed_samples_per_sec"])
    return figures


def _problems(
    code: int | None,
    output: str,
    outcome: Mapping[str, Any],
    entries: Sequence[Mapping[str, Any]],
    latest: Mapping[str, Any],
    mode: str,
) -> list[str]:
    """Why a run does not count, a sentence each."""
    problems = []
    if code is None or code == STOPPED:
        problems.append("it did not end by its deadline: a request was never answered")
    elif code < 0:
        problems.append(f"LoadGen's process was ended by signal {-code}")
    elif code:
        last = (output.strip().splitlines() or ["it printed nothing"])[-1]
        problems.append(f"LoadGen's process ended with exit code {code}: {last}")
    if outcome.get("failed"):
        problems.append(f"LoadGen failed: {outcome['failed']}")
    for reason, count in outcome.get("errors", {}).items():
        problems.append(f"{count} {'samples' if count > 1 else 'sample'} without an answer: {reason}")
    errors = [entry for entry in entries if entry.get("metadata", {}).get("is_error")]
    if errors:
        first = f"{errors[0]['key']}: {errors[0]['value']}"
        problems.append(f"LoadGen logged {len(errors)} ERROR, the first: {first}")
    if not problems and mode == "PerformanceOnly" and latest.get("result_validity") != "VALID":
        unmet = {
            "result_perf_constraints_met": "the latency is beyond its bound",
            "result_min_duration_met": "it was too short",
            "result_min_queries_met": "it had too few queries",
            "early_stopping_met": "too few queries for its percentile",
        }
        said = "; ".join(text for key, text in unmet.items() if latest.get(key) is False)
        problems.append(f"LoadGen calls it {latest.get('result_validity', 'nothing')}: {said or 'no reason given'}")
    return problems
