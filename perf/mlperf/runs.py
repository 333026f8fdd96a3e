"""MLPerf's four scenarios on a running server: LoadGen in a child process with a deadline, and what its logs say.

    served = Served.of(config, server.http_url, pictures, CURVE_THRESHOLD)
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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from build.contract import IMAGES
from build.files import ROOT
from perf.direct import Direct, feeds
from perf.mlperf.child import OUTCOME, REQUEST, STOPPED, Served, client_of

PROGRAM = (sys.executable, "-m", "perf.mlperf.child")
SUMMARY, DETAIL, ACCURACY = "mlperf_log_summary.txt", "mlperf_log_detail.txt", "mlperf_log_accuracy.json"
LOGS = (SUMMARY, DETAIL, ACCURACY, "mlperf_log_trace.json")
BOUND_MS = 100.0  # the rules' bound on the p99 of the server scenario for SSD
SAMPLES_PER_QUERY = 8  # of multi-stream
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
        figure: of a run's figures, the one that it is about.
        queries: the fewest of a run that LoadGen can call VALID.
        workers: threads that send requests; 0 = LoadGen's own thread waits for each answer.
        batch: most pictures in a request.
    """

    member: str
    metric: str
    figure: str
    queries: int
    workers: int
    batch: int


SCENARIOS = {
    "single-stream": Scenario("SingleStream", "p90 latency", "p90_ms", 64, 0, 1),
    "multi-stream": Scenario("MultiStream", "p99 latency of 8", "p99_ms", 662, 2, 8),
    "server": Scenario("Server", "queries/s, p99 within a bound", "p99_ms", 1000, 16, 1),
    "offline": Scenario("Offline", "throughput", "samples_per_second", 1, 4, 8),
}


@dataclass(frozen=True)
class Pace:
    """About how fast a server is, with one request alone and with several clients that send batches.

    LoadGen plans its queries by this.
    """

    latency_ms: float
    images_per_second: float


def pace(served: Served, seconds: float = 1.0) -> Pace:
    """Measures it, which also warms the server up.

    Raises:
        SSDClientError: the server does not answer.
    """
    from ssd_client.preprocess import input_array
    from ssd_client.rule import Preprocessing

    how, rule = SCENARIOS["offline"], Preprocessing(**served.rule)
    images = [input_array(path, rule)[0] for path in served.pictures[: how.batch]]
    with contextlib.closing(client_of(served, retries=2)) as client:

        def ask(feed: Any) -> None:
            client.infer(feed[IMAGES], served.score_threshold)

        alone = Direct([ask], feeds(images), clients=1).latency(seconds / 2)
        batches = feeds(images, batch_size=min(how.batch, served.max_batch_size))
        together = Direct([ask] * how.workers, batches, clients=how.workers).throughput(seconds / 2)
    return Pace(alone["p50"], max(1.0, together))


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
    how, each = SCENARIOS[scenario], pace.latency_ms / 1000
    values: dict[str, Any] = {"scenario": how.member, "mode": "PerformanceOnly", "min_query_count": how.queries}
    values |= {"min_duration_ms": round(seconds * 1000), "accuracy_log_probability": SHARE_LOGGED}
    if scenario == "single-stream":
        values["single_stream_expected_latency_ns"] = int(each / 2 * 1e9)
    elif scenario == "multi-stream":
        each = SAMPLES_PER_QUERY / pace.images_per_second
        values["multi_stream_expected_latency_ns"] = int(each / 2 * 1e9)
        values["multi_stream_samples_per_query"] = SAMPLES_PER_QUERY
    elif scenario == "server":
        rate = rate or float(f"{SHARE_OFFERED * pace.images_per_second:.3g}")
        each = 1 / rate
        values |= {"server_target_qps": rate, "server_target_latency_ns": round(bound_ms * 1e6)}
        # Beyond that many at once the rate is lost: LoadGen stops instead of waiting for a queue without end.
        values["server_max_async_queries"] = max(100, round(2 * rate * max(1.0, bound_ms / 1000)))
    else:
        values["offline_expected_qps"] = 1.4 * pace.images_per_second  # so many samples that the run is long enough
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
    program: Sequence[str] = PROGRAM,
) -> dict[str, Any]:
    """One run of LoadGen, with its logs in `folder`.

    Args:
        served: what is asked.
        scenario, seconds, pace, bound_ms, rate: as for `settings_of`.
        folder: made where it is not there; logs of an earlier run in it are replaced.
        mode: of LoadGen's TestMode: PerformanceOnly or AccuracyOnly.
        null: answer at once instead of asking the server: what LoadGen and the client's process cost.
        program: the child's command line, without its folder.

    Returns:
        `scenario`, `mode`; `loadgen` (VALID, INVALID or empty); `valid`: it is VALID and nothing else is wrong;
        `problems`, a sentence each; `figures` {p50_ms, p90_ms, p99_ms, max_ms, samples_per_second, rate, bound_ms,
        early_stopping_ms (what MLPerf reports of a latency: an upper bound of the percentile with 99 % confidence), as
        far as the scenario has them}; `queries`; `answered` and `failed` (samples); `exit_code` (None where it had to
        be killed); `seconds`; `log`, the first lines of LoadGen's summary.

    Raises:
        KeyboardInterrupt: after the child was told to stop and has ended; its logs stay.
    """
    how, (values, expected) = SCENARIOS[scenario], settings_of(scenario, pace, seconds, bound_ms, rate)
    values["mode"] = mode
    if mode == "AccuracyOnly":
        expected = len(served.pictures) * pace.latency_ms / 1000
    if null:  # so many queries are answered in a moment
        served = replace(served, url="")
        values |= {"max_query_count": NULL_QUERIES, "min_query_count": 1}
    batch = min(how.batch, served.max_batch_size)
    request = {"served": asdict(served), "settings": values, "workers": how.workers, "batch": batch}
    code, output = execute(request, folder, 3 * expected + served.timeout + _GRACE_S, program)
    outcome = json.loads(_text(folder / OUTCOME) or "{}")  # none of a child that died
    head = _text(folder / SUMMARY).partition("Additional Stats")[0]
    entries = read_detail(folder / DETAIL)
    latest = {entry["key"]: entry["value"] for entry in entries}
    problems = _problems(code, output, outcome, entries, mode)
    return {
        "scenario": scenario,
        "mode": mode,
        "loadgen": latest.get("result_validity", ""),
        "figures": _figures(scenario, latest, bound_ms, values),
        "queries": int(latest.get("result_query_count", 0)),
        "answered": sum(count for _, _, count in outcome.get("answers", ())),
        "failed": sum(outcome.get("errors", {}).values()),
        "exit_code": code,
        "seconds": outcome.get("seconds"),
        "log": [line.rstrip() for line in head.splitlines() if ": " in line and "Recommend" not in line],
        "problems": problems,
        "valid": not problems,
    }


def execute(
    request: Mapping[str, Any], folder: Path, deadline_s: float, program: Sequence[str] = PROGRAM
) -> tuple[int | None, str]:
    """Runs the child; its exit code, None where it had to be stopped at its deadline, and the end of what it printed.

    Raises:
        KeyboardInterrupt: after the child has ended.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*LOGS, OUTCOME):
        (folder / name).unlink(missing_ok=True)
    (folder / REQUEST).write_text(json.dumps(request))
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    # A session of its own: Ctrl-C in a terminal is for this process alone.
    process = subprocess.Popen(
        [*program, str(folder.resolve())], cwd=ROOT, text=True, errors="replace", start_new_session=True, **pipes
    )
    try:
        output, _ = process.communicate(timeout=deadline_s)
        return process.returncode, output[-2000:]
    except (subprocess.TimeoutExpired, KeyboardInterrupt) as reason:
        process.send_signal(signal.SIGTERM)  # it lets go of its shared memory
        try:
            output, _ = process.communicate(timeout=_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
        if isinstance(reason, KeyboardInterrupt):
            raise
        return None, output[-2000:]


def _text(path: Path) -> str:
    """A log as far as it was written; empty where there is none."""
    return path.read_text(errors="replace") if path.is_file() else ""


def read_detail(path: Path) -> list[dict[str, Any]]:
    """The entries of a mlperf_log_detail.txt: {key, value, metadata {is_error, …}}."""
    entries = []
    for line in _text(path).splitlines():
        with contextlib.suppress(ValueError):  # the last line of a run that was killed
            entries.append(json.loads(line.partition(" ")[2]))
    return entries


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
    for key in ("result_samples_per_second", "result_completed_samples_per_sec"):
        if key in latest:
            figures["samples_per_second"] = float(latest[key])
    if scenario == "server":
        figures |= {"rate": float(values["server_target_qps"]), "bound_ms": bound_ms}
    return figures


def _problems(
    code: int | None, output: str, outcome: Mapping[str, Any], entries: Sequence[Mapping[str, Any]], mode: str
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
    problems += [f"LoadGen failed: {outcome['failed']}"] if outcome.get("failed") else []
    for reason, count in outcome.get("errors", {}).items():
        problems.append(f"{count} {'samples' if count > 1 else 'sample'} without an answer: {reason}")
    errors = [f"{entry['key']}: {entry['value']}" for entry in entries if entry.get("metadata", {}).get("is_error")]
    problems += [f"LoadGen logged {len(errors)} ERROR, the first: {errors[0]}"] if errors else []
    latest = {entry["key"]: entry["value"] for entry in entries}
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
