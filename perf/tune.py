"""`invoke perf --tune`: which [serving] section answers most images per second under a bound on latency.

    result = tune(spec, published, images, journal, bound_ms=20)
    result["winner"], result["gain"], result["written"]

Successive halving (Jamieson and Talwalkar 2016, "Non-stochastic best arm identification and hyperparameter
optimization"): all candidates are measured for a short time, the better half again for twice as long, until two are
left. Those two and the present setting are then measured in turn, several times: the gain is that of side by side.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build.contract import Target
from build.errors import OptionError, SSDError
from build.files import sha256
from build.publish import backend
from build.publish import config as publish
from build.publish import repository as store
from build.spec import Spec, edit
from perf.bench import Bench, start_bench
from perf.journal import Journal
from perf.load import Load, PerfError
from perf.slo import default_bound, single_stream
from perf.statistics import verdict

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from rich.console import Console
    from tritonclient.grpc.model_config_pb2 import ModelConfig

FINALISTS = 2
ROUNDS = 3  # of the final, the fewest that `verdict` takes
DELAYS_US = (0, 500, 2000)
GPU_INSTANCES = (1, 2, 3, 4)


class TuneError(SSDError):
    """A candidate that answers wrongly or not at all."""


@dataclass(frozen=True, order=True)
class Candidate:
    """One way to serve a model.

    Attributes:
        instances: copies of the model.
        threads: of each.
        dynamic_batching: whether requests that wait are handed to an instance together.
        queue_delay_us: how long they may wait for others.
    """

    instances: int
    threads: int = 1
    dynamic_batching: bool = False
    queue_delay_us: int = 0

    def __str__(self) -> str:
        delay = f", delay {self.queue_delay_us} us" if self.queue_delay_us else ""
        return f"{self.instances} x {self.threads}" + (f", batching{delay}" if self.dynamic_batching else "")

    @classmethod
    def of_config(cls, config: ModelConfig) -> Candidate:
        """What a config.pbtxt says."""
        threads = config.parameters["threads"].string_value if "threads" in config.parameters else "1"
        batching = publish.batches(config)
        delay = config.dynamic_batching.max_queue_delay_microseconds if batching else 0
        return cls(sum(group.count for group in config.instance_group), int(threads), batching, int(delay))

    def keys(self, runtime: str) -> dict[str, int | str]:
        """The keys of [serving] that say this."""
        batching = "on" if self.dynamic_batching else "off"
        return {
            "instances": self.instances,
            **({"threads": self.threads} if runtime == "onnxruntime" else {}),
            "dynamic_batching": "auto" if self.dynamic_batching == (runtime == "tensorrt") else batching,
            "queue_delay_us": self.queue_delay_us,
        }


def candidates(cores: int, runtime: str = "onnxruntime") -> list[Candidate]:
    """What is worth a try.

    On a CPU instances and threads are powers of two (and the number of cores), no more threads each than cores, no more
    in all than twice the cores and no less than half of them. A plan has instances alone. A queue delay goes with
    dynamic batching.

    Args:
        cores: that the server may use.
        runtime: onnxruntime or tensorrt.
    """
    if runtime == "tensorrt":
        pairs = [(instances, 1) for instances in GPU_INSTANCES]
    else:
        sizes = sorted({2**power for power in range(cores.bit_length() + 1)} | {cores, 3})
        pairs = [
            (instances, threads)
            for instances, threads in itertools.product(sizes, sizes)
            if threads <= cores and cores <= 2 * instances * threads <= 4 * cores
        ]
    batching = [(False, 0), *((True, delay) for delay in DELAYS_US)]
    return [Candidate(*pair, *how) for pair, how in itertools.product(pairs, batching)]


# -- the search, which knows nothing of servers ------------------------------------------------------------------------


@dataclass
class Tried:
    """A candidate and what was measured of it in the last rung that it reached.

    Attributes:
        rung: that rung, from 0.
        throughput: images per second, of each repeat.
        p99_ms: likewise.
        failed: why it could not be measured; empty where it could.
    """

    candidate: Candidate
    rung: int = 0
    throughput: list[float] = field(default_factory=list)
    p99_ms: list[float] = field(default_factory=list)
    failed: str = ""

    def held(self, bound_ms: float) -> bool:
        """Whether its p99 (the median of the repeats) is within the bound."""
        return not self.failed and statistics.median(self.p99_ms) <= bound_ms

    def rank(self, bound_ms: float) -> tuple[int, float]:
        """Least is best: most images per second of those that hold the bound, then the lowest p99 of the others."""
        if self.held(bound_ms):
            return 0, -statistics.median(self.throughput)
        return (2, 0.0) if self.failed else (1, statistics.median(self.p99_ms))

    def as_dict(self, bound_ms: float) -> dict[str, Any]:
        """The row of the result."""
        return {
            **dataclasses.asdict(self.candidate),
            "throughput": None if self.failed else statistics.median(self.throughput),
            "p99_ms": None if self.failed else statistics.median(self.p99_ms),
            "rung": self.rung,
            "held": self.held(bound_ms),
            "failed": self.failed,
            "repeats": [] if self.failed else self.throughput,
        }


Measure = Callable[[Candidate, int, int, float], tuple[float, float]]


def search(
    present: Candidate, others: Sequence[Candidate], measure: Measure, bound_ms: float, seconds: float
) -> list[Tried]:
    """Successive halving; the present setting takes part in every rung and takes no other's place.

    Args:
        present: what is served now.
        others: what to try instead.
        measure: (candidate, rung, repeat, seconds) → images per second and p99 in ms; may raise SSDError.
        bound_ms: for the p99.
        seconds: of the first rung's measurements; doubled from rung to rung.

    Returns:
        The present setting, then the others: the further they got, the earlier.

    Raises:
        SSDError: the present setting cannot be measured. Any other that cannot only leaves the search.
    """
    tried = {candidate: Tried(candidate) for candidate in [present, *others]}
    left = [candidate for candidate in tried if candidate != present]

    def take(candidate: Candidate, rung: int, repeat: int, length: float) -> None:
        entry = tried[candidate]
        if entry.failed:
            return
        if repeat == 0:
            entry.rung, entry.throughput, entry.p99_ms = rung, [], []
        try:
            throughput, p99_ms = measure(candidate, rung, repeat, length)
        except SSDError as error:
            if candidate == present:
                raise
            entry.failed = str(error)
        else:
            entry.throughput.append(throughput)
            entry.p99_ms.append(p99_ms)

    rung = 0
    while len(left) > FINALISTS:
        for candidate in [present, *left]:
            take(candidate, rung, 0, seconds * 2**rung)
        working = [candidate for candidate in left if not tried[candidate].failed]
        best = sorted(working, key=lambda candidate: tried[candidate].rank(bound_ms))
        left = best[: max(FINALISTS, math.ceil(len(left) / 2))]
        rung += 1
    for repeat in range(ROUNDS):
        finalists = [present, *left]
        # The first place alternates: whoever has it may gain or lose by that.
        for candidate in finalists if repeat % 2 == 0 else reversed(finalists):
            take(candidate, rung, repeat, seconds * 2**rung)
    rest = [entry for entry in tried.values() if entry.candidate != present]
    return [tried[present], *sorted(rest, key=lambda entry: (-entry.rung, *entry.rank(bound_ms)))]


def measurements(others: int) -> int:
    """How many measurements a search among `others` and the present setting takes, if none fails."""
    count = 0
    while others > FINALISTS:
        count, others = count + others + 1, max(FINALISTS, math.ceil(others / 2))
    return count + ROUNDS * (others + 1)


def decide(tried: Sequence[Tried], bound_ms: float) -> tuple[Tried, bool, str]:
    """The best of the final, whether it should replace the present setting, and in words why or why not.

    It should where it holds the bound and is faster by more than noise; where the present setting does not hold the
    bound, a lower p99 counts in place of throughput.

    Args:
        tried: what `search` returned.
        bound_ms: as there.
    """
    present = tried[0]
    final = [entry for entry in tried if entry.rung == present.rung and not entry.failed]
    winner = min(final, key=lambda entry: entry.rank(bound_ms))
    if winner is present:
        return winner, False, f"the present setting ({present.candidate}) is the best of {len(tried)}"
    if present.held(bound_ms):
        seen, figure = verdict(present.throughput, winner.throughput), "images/s"
        values = f"{statistics.median(present.throughput):.0f} to {statistics.median(winner.throughput):.0f}"
    else:  # then the bound is what matters: the winner holds it, or is nearer to it
        seen, figure = verdict(present.p99_ms, winner.p99_ms, higher_is_better=False), "ms (p99)"
        values = f"{statistics.median(present.p99_ms):.1f} to {statistics.median(winner.p99_ms):.1f}"
    better = seen.verdict == "faster"
    change = f"from {present.candidate} to {winner.candidate}: {values} {figure}"
    if not winner.held(bound_ms):
        return winner, False, f"no setting holds p99 <= {bound_ms:g} ms; the nearest: {change}"
    return winner, better, change if better else f"{change}, which is not more than noise"


# -- on real servers ---------------------------------------------------------------------------------------------------


def tune(
    spec: Spec,
    published: Path,
    images: Sequence[NDArray[np.uint8]],
    journal: Journal,
    *,
    bound_ms: float | None = None,
    traffic: Load | None = None,
    seconds: float = 1.0,
    others: Sequence[Candidate] | None = None,
    write: bool = True,
    console: Console | None = None,
    serving: Callable[..., AbstractContextManager[Bench]] = start_bench,
) -> dict[str, Any]:
    """Searches the best [serving] section on this machine and writes it to spec.toml.

    Args:
        spec: of the model.
        published: a repository that it is published to; copies of it are served, each with a config.pbtxt of its own.
        images: real pictures, UINT8 [H,W,3] at the model's input size.
        journal: where what was measured is kept; what it has already is not measured again, and no server started.
        bound_ms: for the p99; None = `default_bound` of the present setting's single stream.
        traffic: the clients, batch size and protocol to be fast for; None = 4 clients, gRPC.
        seconds: of the first rung's measurements.
        others: what to try; None = `candidates` for this machine's cores.
        write: whether to write the winner to spec.toml.
        console: where to say what is found; None = standard output.
        serving: what starts a server and a Bench of it.

    Returns:
        `candidates`, the present one first: the fields of `Candidate`, `throughput` (images/s) and `p99_ms` (None where
        it failed), `rung`, `held`, `failed` (why), `repeats` (throughputs of its last rung); `winner` and `before`, two
        of them; `gain`: their ratio of throughputs; `bound_ms`, `load`; `written` and `why`.

    Raises:
        SSDError: the present setting cannot be measured, or spec.toml cannot be changed; it is then as it was.
    """
    from rich.console import Console
    from ssd_client import SSDClientError

    show = console or Console(highlight=False, soft_wrap=True)
    if not 0 < seconds < math.inf:
        raise OptionError(f"seconds is {seconds!r}, but must be a number greater than 0")
    traffic = traffic or Load(concurrency=4)
    name = spec.model.name
    manifest = store.served(published, name)[1]
    target = Target.of(manifest)
    runtime, precision = target.runtime, target.precision
    present = Candidate.of_config(publish.config(spec, 0, target, "", backend.of(manifest)))
    others = [candidate for candidate in others or candidates(publish.cores(), runtime) if candidate != present]

    def on_server(candidate: Candidate, function: Callable[[Bench], dict[str, Any]], **what: Any) -> dict[str, Any]:
        def run() -> dict[str, Any]:
            try:
                with (
                    variant(spec, published, candidate) as repository,
                    serving(repository, name, images, Journal()) as bench,
                ):
                    return function(bench)
            except (SSDClientError, OSError) as error:  # of a server that went between two requests
                raise TuneError(f"the server of {candidate} failed: {error}") from error

        key = {"series": "tune", "precision": precision, "candidate": dataclasses.asdict(candidate)}
        return journal.measure({**key, "load": traffic.as_dict(), **what}, run)

    if bound_ms is None:
        single = on_server(
            present, lambda bench: single_stream(bench, seconds=seconds, load=traffic), alone=True, seconds=seconds
        )
        bound_ms = default_bound(single["p50"])
    count = measurements(len(others))
    show.print(f"{name}: {len(others)} settings against {present}, p99 <= {bound_ms:g} ms at {traffic}", markup=False)
    show.print(f"{name}: {count} measurements, each on a server of its own", markup=False)

    def measure(candidate: Candidate, rung: int, repeat: int, length: float) -> tuple[float, float]:
        check = rung == 0 and repeat == 0  # that each answers right is seen once; then figures are undisturbed

        def point(bench: Bench) -> dict[str, Any]:
            # All for the same time, steady or not: the next rung is what doubt costs.
            ask = functools.partial(bench.point, "tune", traffic, seconds=length, check=check, retries=0)
            try:
                return ask()
            except PerfError:  # perf_analyzer fails now and then for reasons of its own
                return ask()

        try:
            return _figures(on_server(candidate, point, rung=rung, repeat=repeat, seconds=length), traffic)
        except SSDError as error:
            show.print(f"{candidate}: {error}", markup=False)
            raise

    tried = search(present, others, measure, bound_ms, seconds)
    winner, better, why = decide(tried, bound_ms)
    rows = [entry.as_dict(bound_ms) for entry in tried]
    best = rows[tried.index(winner)]
    result = {
        "candidates": rows,
        "winner": best,
        "before": rows[0],
        "gain": best["throughput"] / rows[0]["throughput"],
        "bound_ms": bound_ms,
        "load": traffic.as_dict(),
        "written": better and write,
        "why": why,
    }
    show.print(f"{name}: {why}", markup=False)
    if result["written"]:
        edit(
            spec.path,
            {f"serving.{key}": value for key, value in _changes(spec, present, winner.candidate, runtime).items()},
        )
        show.print(f"{name}: written to [serving] of {spec.path}; publish it: invoke build-engines", markup=False)
    else:
        show.print(f"{name}: {spec.path.name} stays as it is", markup=False)
    return result


@contextmanager
def variant(spec: Spec, published: Path, candidate: Candidate) -> Iterator[Path]:
    """A repository with what is served of one model, set up as the candidate says; gone at the end.

    It lies beside `published` and its files are hard links to those there (copies where links are not allowed); its
    config.pbtxt is the one that a publish of the candidate would write.

    Raises:
        PublishError: the model is not published there, or damaged.
    """
    from google.protobuf import text_format

    version, manifest = store.served(published, spec.model.name)
    target = Target.of(manifest)
    keys: dict[str, Any] = candidate.keys(target.runtime)
    changed = dataclasses.replace(spec.serving, **keys)
    changed_spec = dataclasses.replace(spec, serving=changed)
    digest = sha256(version / store.MANIFEST)
    model = manifest["files"][store.MODEL_FILE[target.runtime]]
    config = publish.config(changed_spec, manifest["version"], target, digest, backend.of(manifest), model)
    with tempfile.TemporaryDirectory(prefix=f".{published.name}-", dir=published.parent) as name:
        folder = Path(name) / spec.model.name
        shutil.copytree(version, folder / version.name, copy_function=_link)
        for place in (folder, folder / version.name):
            (place / store.CONFIG).unlink(missing_ok=True)  # one of them is a link to what is published
            (place / store.CONFIG).write_text(text_format.MessageToString(config))
        yield Path(name)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _changes(spec: Spec, present: Candidate, winner: Candidate, runtime: str) -> dict[str, int | str]:
    """The keys of [serving] to write: what is as it was stays open where it was open, for the next machine."""
    keys = winner.keys(runtime)
    if (winner.instances, winner.threads) == (present.instances, present.threads):
        keys = {key: value for key, value in keys.items() if key not in ("instances", "threads")}
    return {key: value for key, value in keys.items() if getattr(spec.serving, key) != value}


def _figures(record: Mapping[str, Any], traffic: Load) -> tuple[float, float]:
    """Images per second and p99.

    Raises:
        TuneError: answers were wrong, or requests failed: whatever its speed, such a setting cannot win.
    """
    point, answers = record["point"], record["answers"] or {}
    bad = {"wrong": answers.get("wrong", 0), "dropped": answers.get("dropped", 0), "failed": point["errors"]}
    if any(bad.values()):
        counts = ", ".join(f"{count} {what}" for what, count in bad.items() if count)
        raise TuneError(
            f"under {traffic} its answers were not all right: {counts}", why="; ".join(answers.get("examples", ()))
        )
    return point["throughput"], point["latency_ms"]["p99"]
