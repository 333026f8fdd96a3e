"""This machine's CPU and system, in words."""

from __future__ import annotations

import contextlib
import platform
from pathlib import Path

from build.publish.config import cores

_FOR_INT8 = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8")


def machine() -> str:
    """Processor, cores and system."""
    name = _facts().get("model name", platform.processor() or platform.machine())
    return f"{name}, {cores()} core(s), {platform.system()} {platform.release()}"


def int8() -> str:
    """Processor, and which of the instructions that the speed of INT8 depends on it has."""
    facts = _facts()
    flags = facts.get("flags", "").split()
    instructions = ", ".join(name for name in _FOR_INT8 if name in flags) or "none of its INT8 instructions"
    return f"{facts.get('model name', 'unknown CPU')}; {instructions}"


def _facts() -> dict[str, str]:
    """What Linux knows of a core; empty elsewhere."""
    with contextlib.suppress(OSError):
        rows = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
        return {key.strip(): value.strip() for key, _, value in rows}
    return {}
