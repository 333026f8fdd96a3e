"""Counters of the kernels' compiled PTX, by source line: `python -m tests.plugins.profile [usual|lower|suppressed]`.

Counted and modelled by the interpreter. The model is not calibrated: it compares two versions, and gives no time.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np

from build.contract import Nms
from tests.plugins import cases
from tests.plugins.interpreter import Interpreter, build_interpreter, build_kernels
from tests.ssd_nms_oracle import Case


def usual(**settings: float) -> Case:
    """SSD300-COCO in FP16, as a trained network answers; the counters of plugins/README.md are of it."""
    random = np.random.default_rng([9, 1])
    return cases.make("usual", random, (1, 8732, 81), "detector", Nms(**settings), (np.float16, np.float16))  # type: ignore[arg-type]


def suppressed() -> Case:
    """87,000 candidates of which nearly all are suppressed: all of them have to be looked at."""
    random = np.random.default_rng([9, 1])
    nms = Nms(score_threshold=0.01, max_detections=200)
    return cases.make("suppressed", random, (1, 8732, 21), "suppressed", nms, (np.float16, np.float16))


CASES = {
    "usual": usual,
    "lower": lambda: usual(score_threshold=0.01, max_detections=200),
    "suppressed": suppressed,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", choices=CASES, nargs="?", default="usual")
    parser.add_argument("--architecture", default="75", help="of the PTX: 75, 100, ...")
    parser.add_argument("--compiler", default="g++", help="the host's C++ compiler")
    parser.add_argument("--lines", type=int, default=12, help="source lines to show of each kernel")
    options = parser.parse_args()
    folder = build_kernels(options.architecture, options.compiler)
    interpreter = Interpreter(build_interpreter(options.compiler), folder, reordered=True)
    result = interpreter.run(CASES[options.case](), timing=True, checks=False)
    assert not result.failure, result.failure
    print("compiled PTX, interpreted; modelled cycles of one block alone, not calibrated: no time")
    report = interpreter.report()
    for launch, kernel in zip(
        report["launches"], sorted(report["kernels"], key=lambda k: "select" in k["kernel"]), strict=True
    ):
        cycles = launch["block_cycles"]
        print(f"{launch['kernel']}: {launch['blocks']} blocks of {launch['threads']} threads")
        print(
            f"  {launch['issues']:,} warp instructions; {launch['barriers']} barriers; modelled cycles of a block: ",
            end="",
        )
        print(f"{sum(cycles) / len(cycles):,.0f}, of the slowest {max(cycles):,.0f}")
        lines: dict[tuple[str, int], list[float]] = defaultdict(lambda: [0.0, 0.0])
        for instruction in kernel["instructions"]:
            line = lines[Path(instruction["file"]).name, instruction["line"]]
            line[0] += instruction["counts"][0]
            line[1] += instruction["counts"][-1]
        for (file, number), (issues, stall) in sorted(lines.items(), key=lambda item: -item[1][0])[: options.lines]:
            print(f"  {issues:10,.0f} issued, {stall:12,.0f} cycles waited: {file}:{number}")


if __name__ == "__main__":
    main()
