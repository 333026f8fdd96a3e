"""What importing the package brings in: its names come when they are first used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ssd_client
from ssd_client import exceptions

ROOT = Path(ssd_client.__file__).parent.parent
NETWORK = ("aiohttp", "asyncio", "google", "grpc", "http.client", "ssl", "tritonclient")


def imported_by(code: str) -> set[str]:
    """The modules of a new Python after it ran `code`."""
    report = f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", report], env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return set(json.loads(run.stdout))


def test_preprocess_brings_in_numpy_and_pillow_only() -> None:
    modules = imported_by("import ssd_client.preprocess")
    assert {"numpy", "PIL.Image", "ssd_client.preprocess"} <= modules
    assert [name for name in NETWORK if name in modules and name not in imported_by("import numpy, PIL.Image")] == []
    assert {name for name in modules if name.startswith("ssd_client")} == {
        "ssd_client",
        "ssd_client.exceptions",
        "ssd_client.preprocess",
        "ssd_client.rule",
        "ssd_client.text",
    }


def test_the_package_alone_brings_in_nothing() -> None:
    modules = imported_by("import ssd_client; ssd_client.__version__; dir(ssd_client)")
    assert {name for name in modules if name.startswith("ssd_client")} == {"ssd_client"}
    assert "numpy" not in modules


def test_every_public_name_is_there() -> None:
    assert set(ssd_client.__all__) <= set(dir(ssd_client))
    for name in ssd_client.__all__:
        assert getattr(ssd_client, name) is getattr(ssd_client, name)
    errors = {name for name, value in vars(exceptions).items() if isinstance(value, type)}
    assert errors <= set(ssd_client.__all__)
    namespace: dict[str, object] = {}
    exec("from ssd_client import *", namespace)
    assert set(ssd_client.__all__) <= namespace.keys()


def test_other_names_are_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'ssd_client' has no attribute 'Nothing'"):
        _ = ssd_client.Nothing  # type: ignore[attr-defined]
    assert not hasattr(ssd_client, "_threshold_inputs")
