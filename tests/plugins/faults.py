"""Faults planted in the kernels' PTX, to see whether the interpreter notices them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from build.contract import Nms
from tests.plugins import cases
from tests.plugins.interpreter import MODES, Interpreter, Mode, difference
from tests.ssd_nms_oracle import Case, Outputs

# Which kernels are changed: those for FP32, with the tile in shared memory.
KERNELS = {"find": "findCandidatesIfLb1", "select": "selectDetectionsIf"}
LAUNCH = 2_000_000  # instructions; a fault can make a kernel run for ever
RUNS: tuple[Mode, ...] = (MODES[0], MODES[5])


@dataclass(frozen=True)
class Fault:
    """One change of the PTX.

    Attributes:
        name: kernel, what is wrong, line.
        ptx: the whole module.
    """

    name: str
    ptx: str


def _subst(pattern: str, replacement: str, line: str) -> str:
    changed, count = re.subn(pattern, replacement, line)
    assert count > 0, line
    return changed


def _changes(line: str) -> Iterator[tuple[str, str]]:
    """What can be wrong with a line: its name, and the line with it."""
    if "bar.sync" in line:
        yield "no barrier", ""
    if "atom.shared.add" in line:
        match = re.search(r"(%\w+), (\[.*?\]), (\S+);", line)
        assert match
        result, address, value = match.groups()
        add = f"{{ .reg .b32 %sum; add.s32 %sum, {result}, {value}; st.shared.u32 {address}, %sum; }}"
        yield "an addition that is not atomic", f"ld.shared.u32 {result}, {address}; {add}"
    if "shfl.sync.bfly" in line:
        yield "half a mask", _subst(r", \S+;$", ", 65535;", line)
        yield "another direction", line.replace(".bfly", ".up")
    if "vote.sync.ballot" in line:
        yield "half a mask in a vote", _subst(r", \S+;$", ", 65535;", line)
    if re.search(r"st\.global\.(v4\.)?(f32|u32|b32)", line):
        yield "a store one further", _subst(r"\[(%\w+)(\+(-?\d+))?\]", lambda m: f"[{m[1]}+{int(m[3] or 0) + 4}]", line)  # type: ignore[arg-type]


def _without_fma(ptx: str) -> str:
    """Products and sums rounded on their own, everywhere: the exponential is another one."""
    pattern = r"fma\.rn\.f32\s+(%\w+), (\S+), (\S+), (\S+);"
    return _subst(pattern, r"{ .reg .f32 %product; mul.rn.f32 %product, \2, \3; add.rn.f32 \1, %product, \4; }", ptx)


def plant(ptx: str) -> list[Fault]:
    """Every barrier that is left out, and the first of each other kind of fault of each kernel."""
    lines, faults, kernel, seen = ptx.splitlines(), [], "", set()
    for number, line in enumerate(lines):
        entry = re.search(r"\.entry (\S+)\(", line)
        if entry:
            kernel = next((name for name, part in KERNELS.items() if part in entry[1].replace("EE", "E")), "")
        for what, changed in _changes(line) if kernel else ():
            if what == "no barrier" or (kernel, what) not in seen:
                seen.add((kernel, what))
                text = "\n".join([*lines[:number], changed, *lines[number + 1 :]])
                faults.append(Fault(f"{kernel}: {what}, line {number + 1}", text))
    return [*faults, Fault("everywhere: two roundings", _without_fma(ptx))]


def fault_cases() -> list[Case]:
    """Small cases that reach every part of the kernels."""
    random = np.random.default_rng(3)
    none = {"score_activation": "none", "lowest_score_threshold": 0.0}

    def case(name: str, shape: tuple[int, int, int], kind: str, **settings: object) -> Case:
        return cases.make(name, random, shape, kind, Nms(**settings))  # type: ignore[arg-type]

    return [
        case("odd", (2, 90, 21), "random"),
        case("cap", (2, 300, 60), "random", score_threshold=0.01, max_detections=500, topk_per_class=3),
        case("narrow", (1, 350, 6), "narrow", **none, score_threshold=0.1, topk_per_class=150, max_detections=900),
        case("detector", (1, 1500, 21), "detector", max_detections=200),
        case("equal", (1, 1300, 3), "equal", **none, score_threshold=0.1, iou_threshold=1.0, max_detections=1400),
    ]


def noticed(interpreter: Interpreter, case: Case, want: Outputs, mode: Mode) -> list[str]:
    """What the interpreter finds wrong with one call, and whether the answer is wrong."""
    result = interpreter.run(case, mode, seed=3, most=LAUNCH)
    kinds = {line.split(" x ", 1)[-1].split(" | ")[0] for line in result.findings}
    if result.failure:
        kinds.add(result.failure)
    elif difference(result.outputs, want):
        kinds.add("another answer")
    return sorted(kinds)
