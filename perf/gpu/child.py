"""One step of the GPU check in a process of its own: `python -m perf.gpu.child STEP OUT MODEL FOLDER`.

OUT receives JSON: `passed`, `why` (empty where it passed) and `result`.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any


def main(name: str, out: Path, model: str, folder: Path) -> int:
    """Runs the step; 0 if it passed."""
    from build.errors import SSDError
    from build.files import write_json
    from perf.gpu.steps import STEPS, Work

    told: dict[str, Any] = {"passed": False, "why": "", "result": {}}
    try:
        (step,) = (step for step in STEPS if step.name == name)
        told["result"] = step.run(Work(model, folder))
        told["passed"] = True
    except SSDError as error:
        told["why"] = str(error)
        print(f"error: {error}", file=sys.stderr)
    except Exception as error:
        traceback.print_exc()
        told["why"] = f"{type(error).__name__}: {error}"
    json.dumps(told)  # what cannot be written is a bug to be seen here
    write_json(out, told)
    return 0 if told["passed"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4])))
