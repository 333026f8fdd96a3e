"""KServe's manifests against KServe's own types."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.deploy.conftest import DOCKER, ROOT, Server, get, parsed, python

KSERVE = ROOT / "deploy" / "kserve"
RUNTIME, SERVICE = KSERVE / "servingruntime.yaml", KSERVE / "inferenceservice.yaml"


def test_manifests_are_as_kserves_schema_says_and_misspelt_ones_are_not(tmp_path: Path) -> None:
    planted = {
        "storageUri:": "storageURI:",
        "minReplicas:": "minReplica:",
        "readinessProbe:": "readinessProb:",
        "supportedModelFormats:": "supportedModelFormat:",
        "sizeLimit:": "sizelimit:",
    }
    wrong = []
    for number, (right, misspelt) in enumerate(planted.items()):
        source = next(path for path in (RUNTIME, SERVICE) if right in path.read_text())
        wrong.append(tmp_path / f"{number}.yaml")
        wrong[-1].write_text(source.read_text().replace(right, misspelt))
    assert python(ROOT / "deploy" / "schemas.py", "validate", RUNTIME, SERVICE).returncode == 0
    done = python(ROOT / "deploy" / "schemas.py", "validate", *wrong)
    assert done.returncode == 1
    for misspelt in planted.values():
        assert f"'{misspelt[:-1]}' was unexpected" in done.stdout


def test_the_service_fits_the_runtime() -> None:
    (runtime,), (service,) = parsed(RUNTIME), parsed(SERVICE)
    model = service["spec"]["predictor"]["model"]
    assert model["runtime"] == runtime["metadata"]["name"]
    formats = runtime["spec"]["supportedModelFormats"]
    assert model["modelFormat"] in [{"name": entry["name"], "version": entry["version"]} for entry in formats]
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
    (container,) = runtime["spec"]["containers"]
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    needed = int(container["lifecycle"]["preStop"]["exec"]["command"][1]) + int(variables["SSD_EXIT_TIMEOUT"])
    assert service["spec"]["predictor"]["terminationGracePeriodSeconds"] > needed
    script = (DOCKER / "serve.sh").read_text()
    assert all(name in script for name in variables if name.startswith("SSD_"))
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert str(container[kind]["httpGet"]["port"]) == variables["SSD_HTTP_PORT"]


@pytest.mark.triton
def test_the_runtimes_probes_are_answered(request: pytest.FixtureRequest) -> None:
    (runtime,) = parsed(RUNTIME)  # skips where the tools are absent, before a server starts
    servers: list[Server] = request.getfixturevalue("servers")
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        get(f"http://{servers[0].http}{runtime['spec']['containers'][0][kind]['httpGet']['path']}")
