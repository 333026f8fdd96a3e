"""The machine in words."""

from __future__ import annotations

from pathlib import Path

import pytest

from build.reports import cpu


def test_a_cpu_is_named_with_what_int8_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "model name\t: Some CPU @ 2 GHz\nflags\t\t: fpu avx2 avx512_vnni sse\n"
    monkeypatch.setattr(Path, "read_text", lambda self: text)
    assert cpu.int8() == "Some CPU @ 2 GHz; avx2, avx512_vnni"
    assert cpu.machine().startswith("Some CPU @ 2 GHz, ")


def test_a_machine_without_cpuinfo_still_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(self: Path) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    monkeypatch.setattr("build.reports.cpu.cores", lambda: 2)
    assert cpu.int8() == "unknown CPU; none of its INT8 instructions"
    assert ", 2 core(s), " in cpu.machine()
