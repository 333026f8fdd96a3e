"""The images' files: Dockerfile by hadolint, serve.sh and canary.py with a real server, the build's steps in a folder.

No Docker engine runs any of this.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import tomlkit
from ssd_client import SSDClient
from ssd_gateway.models import Models
from ssd_gateway.settings import Settings

from models.shapes.scenes import scene
from tests.deploy.conftest import DOCKER, ROOT, Server, free_ports, get, need, parsed, python, run, running, wait

DOCKERFILE = DOCKER / "Dockerfile"
PYTHON3 = shutil.which(f"python{sys.version_info.major}.{sys.version_info.minor}", path="/usr/local/bin:/usr/bin")


def test_hadolint_passes_the_dockerfile_and_would_not_pass_anything(tmp_path: Path) -> None:
    run("hadolint", "--failure-threshold", "info", DOCKERFILE, check=True)
    wrong = tmp_path / "Dockerfile"
    wrong.write_text(DOCKERFILE.read_text().replace("USER 65532:65532", "USER root"))
    assert "DL3002" in run("hadolint", wrong).stdout


def stages() -> dict[str, str]:
    """The text of each stage of the Dockerfile."""
    parts = re.split(r"^FROM \S+ AS ([\w-]+)$", DOCKERFILE.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize(
    ("stage", "asks"),
    [
        ("cpu", '["canary", "http://localhost:8000"]'),
        ("gpu", '["canary", "http://localhost:8000"]'),
        ("gateway", "http://127.0.0.1:8080/healthz"),
    ],
)
def test_an_image_is_not_root_and_asks_its_own_health(stage: str, asks: str) -> None:
    text = stages()[stage]
    assert "USER 65532:65532" in text
    assert asks in re.findall(r"HEALTHCHECK .* CMD (.*)", text)[0]
    assert not re.search(r"(?i)password|secret|token|api_?key", DOCKERFILE.read_text())


def test_the_gpu_image_has_matching_versions() -> None:
    from build.releases import RELEASES

    text = DOCKERFILE.read_text()
    tag = re.search(r"tritonserver:([\d.]+)-py3", text)
    headers, package = re.search(r"TENSORRT_REF=v(\S+)", text), re.search(r"TENSORRT_VERSION=(\S+)", text)
    assert tag
    assert headers
    assert package
    (release,) = [release for release in RELEASES if release.container == tag[1]]
    assert headers[1].startswith(release.tensorrt)
    assert package[1].startswith(release.tensorrt)
    assert set(re.findall(r"CUDA_VERSION=(\S+)", text)) == {release.cuda}


def test_the_build_context_has_what_is_copied() -> None:
    allowed = {line[1:] for line in (DOCKER / "Dockerfile.dockerignore").read_text().split() if line.startswith("!")}
    for name in re.findall(r"^COPY (\w[\w.]*)/? ", DOCKERFILE.read_text(), re.MULTILINE):
        assert name in allowed
        assert (ROOT / name).exists()
    assert all((ROOT / name).exists() for name in allowed)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("", ""), ("stop_grace_period", "stop_grace_perid"), ("service_healthy", "service_helthy"), ("/tmp]", "/tmp, 3]")],
)
def test_compose_is_as_its_specification_says_and_a_misspelt_key_is_caught(
    tmp_path: Path, right: str, wrong: str
) -> None:
    text = (DOCKER / "compose.yaml").read_text()
    assert right in text
    (tmp_path / "compose.yaml").write_text(text.replace(right, wrong) if right else text)
    assert python(ROOT / "deploy" / "schemas.py", "compose", tmp_path / "compose.yaml").returncode == bool(right)


def test_compose_names_only_what_exists(tmp_path: Path) -> None:
    (compose,) = parsed(DOCKER / "compose.yaml")
    services = compose["services"]
    assert set(services) == {"server", "gateway", "prometheus", "grafana"}
    for service in services.values():
        assert service["cap_drop"] == ["ALL"]
        assert service["build"]["target"] in stages() if "build" in service else "@sha256:" in service["image"]
        assert set(service.get("depends_on", ())) <= set(services)
        for volume in service.get("volumes", ()):
            assert (DOCKER / volume.split(":")[0]).resolve().exists(), volume
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), "open to this machine only"
    for name in ("prometheus.yml", "rules.yml"):
        source = DOCKER / name if name.startswith("prom") else ROOT / "deploy/helm/ssd-on-triton/files/rules.yml"
        shutil.copy(source, tmp_path / name)
    run("promtool", "check", "config", tmp_path / "prometheus.yml", check=True)


@pytest.mark.triton
def test_a_server_answers_requests_and_nothing_else(servers: list[Server]) -> None:
    with SSDClient(servers[0].http, protocol="http", model="shapes") as client:
        assert len(client.detect(scene("held_out", 0).image)) > 0
    for path, body in (
        ("v2/systemsharedmemory/region/a/register", b'{"key":"/a","offset":0,"byte_size":1}'),
        ("v2/systemsharedmemory/status", None),
        ("v2/repository/index", b""),
        ("v2/repository/models/shapes/unload", b""),
        ("v2/trace/setting", None),
        ("v2/logging", None),
    ):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(urllib.request.Request(f"http://{servers[0].http}/{path}", body), timeout=5)
        assert refused.value.code == 403, path


@pytest.mark.triton
def test_the_gateway_finds_the_models_of_a_server_that_lists_none(servers: list[Server]) -> None:
    models = Models(Settings(triton=servers[0].grpc))
    try:
        assert models.choose("").config.name == "shapes"
    finally:
        models.close()


def canary(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", str(DOCKER / "canary.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.triton
def test_the_canary_sees_what_health_endpoints_do_not(servers: list[Server], tmp_path: Path) -> None:
    own, url = servers[1], f"http://{servers[1].http}"
    assert canary(url).stdout == "ok\n"
    (port,) = free_ports(1)
    command = [sys.executable, "-I", DOCKER / "canary.py", url, f"--listen={port}", "--seconds=2"]
    with running(command, tmp_path / "canary.log") as process:
        assert wait("the canary listens", lambda: get(f"http://127.0.0.1:{port}/healthz")) == "ok"
        own.send(signal.SIGSTOP)
        try:
            with pytest.raises(urllib.error.HTTPError) as failed:
                get(f"http://127.0.0.1:{port}/healthz", 20)
            assert failed.value.code == 503
        finally:
            own.send(signal.SIGCONT)
        assert wait("it is well again", lambda: get(f"http://127.0.0.1:{port}/healthz", 20)) == "ok"
        process.kill()  # after SIGTERM it stays until the server is gone
    assert "no model" in canary(url + "/x").stderr or canary(url + "/x").returncode == 1
    refused = canary(f"http://127.0.0.1:{port}")
    assert refused.returncode == 1
    assert "refused" in refused.stderr


@pytest.mark.triton
def test_a_server_drains_before_it_ends(data_repository: Path, backend_folder: Path, tmp_path: Path) -> None:
    """From SIGTERM on balancers are told to send nothing more, while requests are answered as before."""
    server = Server(str(data_repository), backend_folder, tmp_path / "log", drain=1).start()
    probes = f"http://127.0.0.1:{server.ports[3]}"
    try:
        for path in ("/readyz", "/healthz"):
            assert wait(f"{path} is there", lambda path=path: get(probes + path)) == "ok"
        server.send(signal.SIGTERM)

        def told() -> bool:
            try:
                get(f"{probes}/readyz")
            except urllib.error.HTTPError as error:
                return error.code == 404
            return False

        wait("the probe says so", told, 1)
        with SSDClient(server.http, protocol="http", model="shapes", retries=0) as client:
            assert len(client.detect(scene("held_out", 0).image)) > 0
        assert server.process is not None
        assert server.process.wait(15) == 0
        with pytest.raises(ConnectionRefusedError), contextlib.closing(socket.socket()) as probe:
            probe.connect(("127.0.0.1", server.ports[3]))
    finally:
        server.stop()


def test_the_gateways_lock_has_what_the_client_asks_for() -> None:
    """In the versions that the tests ran with."""
    project = tomlkit.parse((ROOT / "pyproject.toml").read_text())
    client = tomlkit.parse((ROOT / "client" / "pyproject.toml").read_text())["project"]
    names = [
        {re.split(r"[<>=]", entry)[0] for entry in entries}
        for entries in (
            project["dependency-groups"]["gateway"],
            client["dependencies"] + client["optional-dependencies"]["gateway"],
        )
    ]
    assert names[0] == names[1]
    pinned = [
        set(re.findall(r"^(\S+==\S+)", (ROOT / "requirements" / f"{name}.lock").read_text(), re.MULTILINE))
        for name in ("gateway", "runtime")
    ]
    assert pinned[0] < pinned[1]


@pytest.mark.triton
@pytest.mark.long
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to run the gateway as the image's user")
@pytest.mark.skipif(PYTHON3 is None, reason="needs a python3 of .venv's version that every user may run")
def test_the_gateway_images_steps_make_a_gateway_that_runs_as_its_user(servers: list[Server], tmp_path: Path) -> None:
    """The steps of `gateway-build` and the start of `gateway`, with the image's folder moved below a folder."""
    image = tmp_path / "image"
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents[:3]:
        parent.chmod(parent.stat().st_mode | 0o055)
    place = {"/opt/gateway": str(image), "/tmp/gateway.lock": str(ROOT / "requirements" / "gateway.lock")}
    (pip,) = steps("gateway-build")
    copies = re.findall(r"^COPY (client/\S+) (\S+)$", stages()["gateway-build"], re.MULTILINE)
    for name, moved in place.items():
        pip = pip.replace(name, moved)
    subprocess.run(["bash", "-ec", pip.replace("pip ", f"{sys.executable} -m pip -q ", 1)], check=True, cwd=ROOT)
    for source, target in copies:
        shutil.copytree(ROOT / source, target.replace("/opt/gateway", str(image)))
    variables = dict(re.findall(r"(\w+)=(\S+)", " ".join(re.findall(r"ENV ((?:.*\\\n)*.*)", stages()["gateway"]))))
    variables = {key: value.replace("/opt/gateway", str(image)) for key, value in variables.items()}
    (port,) = free_ports(1)
    (entry,) = re.findall(r"ENTRYPOINT (\[.*\])", stages()["gateway"])
    (probe,) = re.findall(r"HEALTHCHECK .* CMD (\[.*\])", stages()["gateway"])
    command, check = ([PYTHON3, "-s", *json.loads(text.replace("8080", str(port)))[1:]] for text in (entry, probe))
    options = {"env": {**variables, "SSD_GATEWAY_TOKEN": "abc"}, "user": 65532, "group": 65532, "cwd": "/"}
    command += [f"--triton={servers[0].grpc}"]
    with running(command, tmp_path / "log", **options, extra_groups=[]):
        wait("the image's health check passes", lambda: subprocess.run(check, capture_output=True).returncode == 0, 30)
        picture = io.BytesIO()
        scene("held_out", 0).image.save(picture, "PNG")
        headers = {"Content-Type": "image/png", "Authorization": "Bearer abc"}
        ask = urllib.request.Request(f"http://127.0.0.1:{port}/detect", picture.getvalue(), headers)
        with urllib.request.urlopen(ask, timeout=20) as answer:
            assert json.loads(answer.read())["detections"]
        del ask.headers["Authorization"]
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(ask, timeout=20)
        assert refused.value.code == 401


def steps(stage: str) -> list[str]:
    """The shell commands of a stage."""
    text = re.sub(r"\\\n", " ", stages()[stage])
    return re.findall(r"^RUN (.*)$", text, re.MULTILINE)


@pytest.mark.triton
@pytest.mark.long
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to run the server as the image's user")
def test_the_cpu_images_steps_make_a_server_that_runs_as_its_user(data_repository: Path, tmp_path: Path) -> None:
    """The last step of `build` and the start of `cpu`, with the image's folders moved below a folder."""
    need("hadolint")  # the rest of deploy-check is there
    image = tmp_path / "image"
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents[:3]:
        parent.chmod(parent.stat().st_mode | 0o055)
    place = {"/opt/ssd": str(image), "/venv/bin/python": sys.executable, "/s3tool": str(tmp_path / "s3tool")}
    install = next(step for step in steps("build") if "--target /s3tool" in step)
    pip = next(part for part in install.split("&&") if "/s3tool" in part)
    for name, moved in place.items():
        pip = pip.replace(name, moved)
    subprocess.run(["bash", "-ec", pip.replace("/venv/bin/pip", f"{sys.executable} -m pip")], check=True, cwd=ROOT)
    script = next(step for step in steps("build") if "deploy.backends" in step)
    for name, moved in place.items():
        script = script.replace(name, moved)
    subprocess.run(["bash", "-eo", "pipefail", "-c", script], check=True, cwd=ROOT)
    models = shutil.copytree(data_repository, tmp_path / "models")
    ports = free_ports(3)
    variables = dict(re.findall(r"(\w+)=(\S+)", " ".join(re.findall(r"ENV ((?:.*\\\n)*.*)", stages()["cpu"]))))
    variables = {key: value.replace("/opt/ssd", str(image)) for key, value in variables.items()}
    variables |= {"PATH": f"{image}/bin:/usr/bin:/bin", "SSD_REPOSITORY": str(models), "SSD_HTTP_PORT": str(ports[0])}
    variables |= {"SSD_GRPC_PORT": str(ports[1]), "SSD_METRICS_PORT": str(ports[2])}
    (entry,) = re.findall(r'ENTRYPOINT \["(\w+)"\]', stages()["cpu"])
    log = tmp_path / "log"
    options = {"env": variables, "user": 65532, "group": 65532, "extra_groups": [], "cwd": "/"}
    with running([image / "bin" / entry], log, **options) as process:

        def healthy() -> bool:
            assert process.poll() is None, log.read_text()
            return canary(f"http://127.0.0.1:{ports[0]}").returncode == 0

        wait("the image's server answers", healthy, 60)
        assert process.args[0] == str(image / "bin" / "serve")  # type: ignore[index]


def test_a_plan_is_kept_by_gpu_and_tensorrt_and_needs_a_gpu(tmp_path: Path) -> None:
    script = DOCKER / "build_plan.py"
    found = importlib.util.spec_from_file_location("build_plan", script)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    one = module.key("NVIDIA H100 80GB HBM3", "9.0", "10.13.2.6")
    assert one == "nvidia-h100-80gb-hbm3-sm9.0-tensorrt10.13.2.6"
    assert (
        len({one, module.key("NVIDIA H200", "9.0", "10.13.2.6"), module.key("NVIDIA H100 80GB HBM3", "9.0", "11")}) == 3
    )
    command = [sys.executable, str(script), f"--cache={tmp_path}", f"--into={tmp_path}"]
    environment = {**os.environ, "SSD_PROJECT": str(ROOT), "PATH": "/nonexistent"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert "nvidia-smi shows no GPU" in done.stderr
    assert list(tmp_path.iterdir()) == []
