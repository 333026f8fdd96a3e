"""`invoke gpu-check`: every step that can run here, in order of worth, each with its own verdict.

What passed on the same sources, GPU and TensorRT is not run again. Nothing is installed.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build.errors import OptionError
from build.files import ARTIFACTS, ROOT, relative, write_json
from perf.gpu.needs import Here, look
from perf.gpu.steps import STEPS, Step

if TYPE_CHECKING:
    from rich.console import Console

RESULTS = ROOT / "perf" / "results" / "gpu"
PASSED, FAILED, MISSING = "passed", "failed", "missing"
_LOG_LINES = 60


@dataclass(frozen=True)
class Verdict:
    """What became of a step.

    Attributes:
        step: its name.
        state: passed, failed or missing.
        text: why it failed, or the names of what is missing.
        seconds: that it took; 0 = it did not run now.
    """

    step: str
    state: str
    text: str
    seconds: float = 0.0


def gpu_check(
    *,
    model: str = "shapes",
    only: Sequence[str] = (),
    site: Path | None = None,
    force: bool = False,
    artifacts: Path = ARTIFACTS,
    results: Path = RESULTS,
    steps: Sequence[Step] = STEPS,
    here: Here | None = None,
    console: Console | None = None,
) -> int:
    """Runs the steps and prints a table.

    Args:
        model: a folder of models/.
        only: names of steps; none = all.
        site: a folder of packages for this Python, which may be read-only, for machines without a registry.
        force: whether what passed before is run again.
        artifacts: plans and other work go to `gpu/` in it.
        results: gets <gpu>-<tensorrt>/<step>.json, and <gpu>-<tensorrt>/<model>/<step>.json of the steps with plans.
        steps, here: for tests.
        console: where to print; None = standard output.

    Returns:
        0 if nothing that could run failed, else 1.

    Raises:
        OptionError: there is no such step or folder.
    """
    from rich.console import Console

    known = [step.name for step in steps]
    unknown = sorted(set(only) - set(known))
    if unknown:
        raise OptionError(f"there is no step {', '.join(unknown)}", fix=f"take some of {', '.join(known)}")
    if site is not None and not site.is_dir():
        raise OptionError(f"--site is {site}, but there is no such folder", fix="name a folder of Python packages")
    show = console or Console(highlight=False, markup=False)
    work = artifacts / "gpu"
    here = here or Here(site, work)
    folder = results / _slug(here)
    verdicts = []
    for step in steps:
        if not only or step.name in only:
            verdict = _judge(step, here, model, work, folder, force, show)
            verdicts.append(verdict)
            if verdict.seconds or verdict.state == FAILED:
                show.print(f"{step.name}: {verdict.state} ({verdict.seconds:.0f} s) {verdict.text}", soft_wrap=True)
    show.print(_needs(here, steps), "", _table(verdicts, steps), sep="\n")
    counts = {state: sum(verdict.state == state for verdict in verdicts) for state in (PASSED, FAILED, MISSING)}
    show.print(f"{counts[PASSED]} passed, {counts[FAILED]} failed, {counts[MISSING]} need what is not here")
    if folder.is_dir():
        show.print(f"raw results: {relative(folder)}")
    return int(counts[FAILED] > 0)


def _slug(here: Here) -> str:
    gpu = here.gpu.name if here.gpu else "no-gpu"
    text = f"{gpu} tensorrt {here.tensorrt}" if here.tensorrt else f"{gpu} no tensorrt"
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-").replace("tensorrt-", "", 1 if here.tensorrt else 0)


def _key(here: Here, model: str) -> dict[str, Any]:
    """What a verdict holds for."""
    from perf.environment import commit

    gpu = here.gpu.as_dict() if here.gpu else None
    return {"model": model, "commit": commit(), "gpu": gpu, "tensorrt": here.tensorrt}


def _judge(step: Step, here: Here, model: str, work: Path, folder: Path, force: bool, show: Console) -> Verdict:
    """Looks what the step needs, and runs it if that is there and it has not passed before."""
    missing = [need for need in step.needs if not look(here, need).there]
    if missing:
        return Verdict(step.name, MISSING, ", ".join(missing))
    wants = [item.text for item in (look(here, want) for want in step.wants) if not item.there]
    of_a_model = "tensorrt" in step.needs
    file, key = (folder / model if of_a_model else folder) / f"{step.name}.json", _key(here, model)
    before = _read(file)
    unchanged = before.get("key") == key and key["commit"] and not key["commit"]["dirty"]
    if unchanged and before.get("verdict") == PASSED and not force:
        return Verdict(step.name, PASSED, "before, with the same sources")
    show.print(f"{step.name}: {step.about} ...")
    started = time.monotonic()
    told, log = _run(step, here, model, work)
    seconds = time.monotonic() - started
    state = PASSED if told["passed"] else FAILED
    left_out = f"left out, for want of: {'; '.join(wants)}" if wants else ""
    content = {"step": step.name, "verdict": state, "why": told["why"], "seconds": round(seconds, 1), "key": key}
    content |= {"left out": left_out, "environment": _environment(), "result": told["result"], "log": log}
    write_json(file, content)
    return Verdict(step.name, state, told["why"].splitlines()[0] if told["why"] else left_out, seconds)


def _environment() -> dict[str, Any]:
    from perf import environment

    return {**environment.capture(), "time": time.strftime("%F %TZ", time.gmtime())}


def _read(file: Path) -> dict[str, Any]:
    try:
        told: dict[str, Any] = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return told


def _run(step: Step, here: Here, model: str, work: Path) -> tuple[dict[str, Any], list[str]]:
    """The child's answer and the end of what it printed."""
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="ssd-gpu-") as scratch:
        out, log = Path(scratch, "told.json"), Path(scratch, "log")
        command = [sys.executable, "-m", "perf.gpu.child", step.name, str(out), model, str(work)]
        with log.open("wb") as file:
            process = subprocess.Popen(command, cwd=ROOT, env=here.environment(), stdout=file, stderr=subprocess.STDOUT)
            try:
                status = process.wait(step.limit)
                why = f"its process ended with {_ending(status)}"
            except subprocess.TimeoutExpired:
                why = f"not finished after {step.limit} s"
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        lines = log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
        told = _read(out) or {"passed": False, "why": why, "result": {}}
    return told, lines


def _ending(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"


def _needs(here: Here, steps: Sequence[Step]) -> Any:
    """What is here and what is missing."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 1), title="what the steps need", title_justify="left")
    for column in ("", "need", "here, or how to get it"):
        table.add_column(column, overflow="fold")
    for need in dict.fromkeys(need for step in steps for need in (*step.needs, *step.wants)):
        found = look(here, need)
        if found.text:
            mark = Text("ready", "green") if found.there else Text("missing", "yellow")
            table.add_row(mark, need, Text(found.text))
    return table


def _table(verdicts: Sequence[Verdict], steps: Sequence[Step]) -> Any:
    """What became of the steps."""
    from rich.table import Table
    from rich.text import Text

    about = {step.name: step.about for step in steps}
    table = Table(box=None, padding=(0, 1), title="steps", title_justify="left")
    for column in ("verdict", "step", "what", "missing, or why it failed"):
        table.add_column(column, overflow="fold")
    colours = {PASSED: "green", FAILED: "red", MISSING: "yellow"}
    for verdict in verdicts:
        state = Text(verdict.state, style=colours[verdict.state])
        table.add_row(state, verdict.step, about[verdict.step], Text(verdict.text))
    return table
