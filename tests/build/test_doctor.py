"""Doctor on machines of every kind: what it finds, what it says to do, and its exit status."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from rich.console import Console
from tritonclient.grpc.model_config_pb2 import ModelConfig

from build import doctor, tritonserver
from build import machine as looks
from build import spec as specs
from build.contract import Target
from build.doctor import Finding, examine
from build.errors import ServeError
from build.graph.attach import attach
from build.machine import Machine
from build.publish import backend, repository
from build.publish.backend import Backend
from build.tritonserver import Installation
from tests.build import tiny_model

ROOT = Path(__file__).resolve().parents[2]
ENGINE = {
    "tensorrt": "10.16.1.11",
    "gpu": {"name": "NVIDIA H200", "compute_capability": "9.0"},
    "options": {},
    "plugin": {"file": "libssd_nms.so", "sha256": "0" * 64, "plugin": "SSDNMS", "plugin_version": "1"},
}
SMI = "NVIDIA H200, 9.0, 143771, 580.65.06"


def fake_run(answers: dict[str, tuple[int, str]]) -> Any:
    """Commands by the name of their program; anything else is not installed."""

    def run(command: Sequence[str]) -> tuple[int, str]:
        name = Path(command[0]).name
        if name == "nvidia-smi" and len(command) == 1 and answers.get(name, (1, ""))[0] == 0:
            return 0, "| NVIDIA-SMI 580.65.06   Driver Version: 580.65.06   CUDA Version: 13.0 |"
        return answers.get(name, (-1, f"{name}: not found"))

    return run


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A machine with nothing on it, and a free port."""
    for name in ("repository", "models", "lib", "shm"):
        (tmp_path / name).mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return Machine(
        tmp_path / "models",
        tmp_path / "repository",
        tmp_path / "lib",
        tmp_path / "shm",
        [port],
        fake_run({}),
        tmp_path / "backends",
    )


def published(machine: Machine, name: str = "shapes", version: int = 1, **manifest: Any) -> Path:
    """A version folder as `build.publish.repository` publishes it."""
    folder = machine.repository / name / str(version)
    folder.mkdir(parents=True)
    (folder / "model.plan").write_bytes(b"plan")
    data = {"runtime": "tensorrt", "precision": "fp32", "built": "today", **manifest}
    data["files"] = {"model.plan": hashlib.sha256(b"plan").hexdigest()}
    text = json.dumps(data).encode()
    (folder / "manifest.json").write_bytes(text)
    config = ModelConfig(name=name)
    config.version_policy.specific.versions.append(version)
    config.parameters["manifest_sha256"].string_value = hashlib.sha256(text).hexdigest()
    for target in (folder, folder.parent):
        (target / "config.pbtxt").write_text(text_format.MessageToString(config))
    return folder


def only(findings: list[Finding], area: str, name: str) -> Finding:
    matching = [finding for finding in findings if finding.area == area and finding.name == name]
    assert len(matching) == 1, [(f.area, f.name) for f in findings]
    return matching[0]


def test_a_machine_without_anything_is_examined_to_the_end(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Any:
        raise ServeError("no tritonserver on PATH", fix="run through ./invoke")

    monkeypatch.setattr(tritonserver, "find", none)
    monkeypatch.setattr(doctor, "driver_version", lambda: "")
    findings = examine(machine)
    assert {finding.area for finding in findings} >= {"Python", "GPU", "TensorRT", "Triton", "Plugins", "Published"}
    assert only(findings, "GPU", "GPU").state == "info"
    assert only(findings, "Triton", "tritonserver").state == "problem"
    assert only(findings, "Published", "models").state == "info"


def test_which_backend_serves_on_the_cpu(machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    python = backend.prepare("python")
    installed = Installation(tmp_path, tmp_path, tmp_path / "no stub", from_wheel=False)
    monkeypatch.setattr(tritonserver, "find", lambda: installed)
    for chosen, of_backend, of_stub in (
        (replace(python, why="no C++ compiler on PATH"), "info", "problem"),
        (replace(python, name=backend.NATIVE, why="compiled here"), "ok", "info"),
    ):
        monkeypatch.setattr(backend, "look", lambda *args, chosen=chosen, **kwargs: chosen)
        findings = examine(machine)
        finding = only(findings, "Triton", "backend for the CPU")
        assert (finding.state, finding.text) == (of_backend, f"{chosen.name}: {chosen.why}")
        assert ("install one" in finding.fix) == (chosen.name == "python")
        assert only(findings, "Triton", "stub of the python backend").state == of_stub


def test_every_fault_says_what_to_do(machine: Machine) -> None:
    published(machine, engine=ENGINE)
    (machine.libraries / "libother.so").write_bytes(b"no library")
    findings = examine(machine)
    assert [finding for finding in findings if finding.state in ("warning", "problem")]
    assert all(finding.fix for finding in findings if finding.state in ("warning", "problem"))
    assert all(finding.state in doctor.STATES and finding.text for finding in findings)


def test_the_gpu_and_its_driver(machine: Machine) -> None:
    machine.run = fake_run({"nvidia-smi": (0, SMI)})
    findings = examine(machine)
    assert only(findings, "GPU", "GPU").text == "NVIDIA H200, compute capability 9.0, 140 GiB"
    assert only(findings, "GPU", "driver").text == "580.65.06, for CUDA up to 13.0"


def test_a_driver_that_does_not_answer_is_a_problem(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.run = fake_run({"nvidia-smi": (9, "Failed to initialize NVML: Driver/library version mismatch")})
    monkeypatch.setattr(doctor, "driver_version", lambda: "580.65.06")
    finding = only(examine(machine), "GPU", "GPU")
    assert finding.state == "problem"
    assert "version mismatch" in finding.text


def test_a_whole_model_and_one_that_was_touched(machine: Machine) -> None:
    folder = published(machine, runtime="onnxruntime")
    assert only(examine(machine), "Published", "shapes version 1, served").state == "ok"
    (folder / "model.plan").write_bytes(b"other")
    finding = only(examine(machine), "Published", "shapes version 1, served")
    assert finding.state == "problem"
    assert "model.plan has changed" in finding.text
    assert "--force" in finding.fix


@pytest.mark.parametrize("content", ["{}", "[1, NaN]", "null", "[" * 100_000], ids=["empty", "list", "null", "deep"])
def test_a_damaged_older_version_only_spoils_the_rollback(machine: Machine, content: str) -> None:
    old = published(machine, version=1, runtime="onnxruntime")
    published(machine, version=2, runtime="onnxruntime")
    (old / "manifest.json").write_text(content)
    findings = examine(machine)
    assert only(findings, "Published", "shapes version 1").state == "warning"
    assert only(findings, "Published", "shapes version 2, served").state == "ok"


def test_a_config_without_its_version_is_a_problem(machine: Machine) -> None:
    published(machine, version=3)
    config = machine.repository / "shapes" / "config.pbtxt"
    config.write_text(config.read_text().replace("3", "4", 1))
    finding = only(examine(machine), "Published", "shapes")
    assert finding.state == "problem"
    assert "[3]" in finding.text


@pytest.fixture
def tiny(machine: Machine, tmp_path: Path) -> Path:
    """The spec.toml of a tiny model that is really published, for a backend that is not installed here."""
    path = tiny_model.write(machine.models / "tiny")
    built = tmp_path / "built.onnx"
    spec = specs.load(path)
    built.write_bytes(attach(spec).SerializeToString())
    ours = backend.of({"serving": {"backend": backend.NATIVE}})
    assert ours
    served_by = Backend(ours.name, "a stand-in", {}, ours.sources, {"libtriton_ssd_onnxruntime.so": "ab" * 32})
    repository.publish(spec, built, machine.repository, Target("onnxruntime"), served_by=served_by)
    return path


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (Path.unlink, "its config.pbtxt is missing"),
        (lambda config: config.write_text(""), "cannot be read, or names no version"),
        (lambda config: config.write_text(config.read_text() + "#"), "is not that of version 1"),
    ],
)
def test_damage_to_the_config_is_a_problem(machine: Machine, tiny: Path, damage: Any, text: str) -> None:
    damage(machine.repository / "tiny" / "config.pbtxt")
    finding = only(examine(machine), "Published", "tiny")
    assert (finding.state, finding.fix) == ("problem", "./invoke build-engines --model tiny --force")
    assert text in finding.text


def test_the_backend_that_a_version_was_tested_with(machine: Machine, tiny: Path) -> None:
    label = "tiny version 1, served: backend"
    finding = only(examine(machine), "Published", label)
    assert (finding.state, "holds no whole ssd_onnxruntime" in finding.text) == ("problem", True)
    folder = machine.backends / backend.NATIVE
    folder.mkdir(parents=True)
    digests = {}
    for name in (backend.LIBRARY, backend.RUNTIME):
        (folder / name).write_bytes(b"a library")
        digests[name] = hashlib.sha256(b"a library").hexdigest()
    (folder / "manifest.json").write_text(json.dumps({"built_from": "", "onnxruntime": "1", "files": digests}))
    assert "tested with other libraries" in only(examine(machine), "Published", label).text
    (folder / backend.LIBRARY).write_bytes(b"half")
    assert "is not as it was installed" in only(examine(machine), "Published", label).text


def test_libraries_in_a_version_folder_are_of_an_older_build(machine: Machine, tiny: Path) -> None:
    (machine.repository / "tiny" / "1" / "libonnxruntime.so.1").write_bytes(b"a library")
    finding = only(examine(machine), "Published", "tiny version 1, served: libraries")
    assert (finding.state, finding.fix) == ("warning", "./invoke build-engines --model tiny --force")


@pytest.fixture
def compilers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Every C++ compiler on PATH writes to this file when it runs, and nothing else is on PATH."""
    ran, folder = tmp_path / "ran", tmp_path / "bin"
    folder.mkdir()
    for name in ("c++", "g++", "clang++"):
        (folder / name).write_text(f"#!/bin/sh\necho {name} >> {ran}\n")
        (folder / name).chmod(0o755)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(folder))
    return ran


def test_a_stale_model_names_what_changed(machine: Machine, tiny: Path, compilers: Path) -> None:
    finding = only(examine(machine), "Published", "tiny: source")
    assert (finding.state, finding.text) == ("ok", "unchanged since this version was built")
    tiny.write_text("# a comment\n" + tiny.read_text())
    assert only(examine(machine), "Published", "tiny: source").state == "ok"
    specs.edit(tiny, {"nms.score_threshold": 0.2})
    (tiny.parent / "labels.txt").write_text("dog\ncat\n")
    finding = only(examine(machine), "Published", "tiny: source")
    assert (finding.state, finding.text) == ("warning", "changed since: labels.txt, nms.score_threshold")
    assert finding.fix == "./invoke build-engines --model tiny"


def test_a_version_that_an_older_build_published_is_stale(machine: Machine) -> None:
    machine.models = ROOT / "models"
    published(machine, runtime="onnxruntime", inputs={"spec.toml": "0" * 64})
    finding = only(examine(machine), "Published", "shapes: source")
    assert finding.state == "warning"
    assert "spec.toml" in finding.text


def test_a_broken_source_is_a_finding_and_leaves_the_other_models(machine: Machine, tiny: Path) -> None:
    tiny_model.write(machine.models / "broken").write_text("[model]\nname = 7\n")
    published(machine, "broken", runtime="onnxruntime")
    findings = examine(machine)
    assert "name is 7" in only(findings, "Published", "broken: source").text
    assert only(findings, "Published", "broken: source").state == "problem"
    assert only(findings, "Published", "tiny: source").text


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder below, with its time of change and its size."""
    entries = {path: path.lstat() for path in folder.rglob("*")}
    return {str(path): (entry.st_mtime_ns, entry.st_size) for path, entry in entries.items()}


def test_doctor_changes_nothing_and_compiles_nothing(
    machine: Machine, tiny: Path, compilers: Path, tmp_path: Path
) -> None:
    """On a whole project of its own, where every default points into it: artifacts/, models/, model_repository/ ..."""
    project = tmp_path / "project"
    unwanted = shutil.ignore_patterns("__pycache__")
    for name in ("build", "client"):
        shutil.copytree(ROOT / name, project / name, ignore=unwanted)
    shutil.copytree(machine.models, project / "models")
    shutil.copytree(machine.repository, project / "model_repository")
    for name in ("home", "tmp"):
        (project / name).mkdir()
    environment = {**os.environ, "HOME": str(project / "home"), "TMPDIR": str(project / "tmp")}
    environment |= {"PYTHONPATH": str(project / "client"), "PYTHONDONTWRITEBYTECODE": "1"}
    before = listing(project)
    code = "import build.files, build.doctor; print(build.files.ROOT); build.doctor.doctor(as_json=True)"
    done = subprocess.run([sys.executable, "-c", code], cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    root, _, output = done.stdout.partition("\n")
    assert root == str(project)
    findings = {(entry["area"], entry["name"]): entry["text"] for entry in json.loads(output)["findings"]}
    assert findings["Triton", "backend for the CPU"] == "ssd_onnxruntime: the next build compiles it with c++"
    assert findings["Published", "tiny: source"] == "unchanged since this version was built"
    assert listing(project) == before
    assert not (project / "artifacts").exists()
    assert not compilers.exists()


def test_an_examination_leaves_shared_memory_and_libraries_alone(
    machine: Machine, tiny: Path, compilers: Path, tmp_path: Path
) -> None:
    machine.run = looks.run
    (machine.shm / "ssd-triton-0123456789ab-1").write_bytes(b"x")
    before = listing(tmp_path)
    examine(machine)
    assert listing(tmp_path) == before
    assert not machine.backends.exists()


@pytest.mark.parametrize(
    ("smi", "state", "text"),
    [
        ("", "problem", "no GPU here"),
        (SMI, "ok", "built for NVIDIA H200 with TensorRT 10.16.1.11"),
        ("Tesla T4, 7.5, 15360, 580.65.06", "problem", "here is Tesla T4 (7.5)"),
    ],
)
def test_a_plan_and_the_gpu_here(machine: Machine, smi: str, state: str, text: str) -> None:
    machine.run = fake_run({"nvidia-smi": (0, smi)} if smi else {})
    published(machine, engine=ENGINE)
    finding = only(examine(machine), "Published", "shapes version 1, served: plan")
    assert (finding.state, text in finding.text) == (state, True)


def test_a_plan_of_another_tensorrt_than_the_servers(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.run = fake_run({"nvidia-smi": (0, SMI)})
    monkeypatch.setattr(Installation, "version", "2.71.0")
    monkeypatch.setattr(tritonserver, "find", lambda: Installation(*map(Path, "abc"), from_wheel=False))
    published(machine, engine=ENGINE)
    finding = only(examine(machine), "Published", "shapes version 1, served: server")
    assert "tritonserver 2.71 has TensorRT 11.1" in finding.text
    published(machine, "other", engine={**ENGINE, "tensorrt": "11.1.0.5"})
    assert not [f for f in examine(machine) if f.name == "other version 1, served: server"]


def test_the_plugin_that_a_plan_needs(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    label = "shapes version 1, served: plugin"
    library = machine.libraries / "libssd_nms.so"
    data = b"the library"
    engine = {**ENGINE, "plugin": {**ENGINE["plugin"], "sha256": hashlib.sha256(data).hexdigest()}}  # type: ignore[dict-item]
    published(machine, engine=engine)
    finding = only(examine(machine), "Published", label)
    assert finding.state == "problem"
    assert "SSDNMS version 1 from libssd_nms.so" in finding.text
    library.write_bytes(b"another build")
    assert "another build" in only(examine(machine), "Published", label).text
    library.write_bytes(data)
    finding = only(examine(machine), "Published", label)
    assert (finding.state, "LD_PRELOAD" in finding.fix) == ("info", True)  # without tensorrt nobody can ask
    monkeypatch.setattr(doctor, "tensorrt_version", lambda: "10.16.1.11")
    machine.run = fake_run({Path(sys.executable).name: (1, "")})
    assert "finds no creator SSDNMS" in only(examine(machine), "Published", label).text
    machine.run = fake_run({Path(sys.executable).name: (0, "{}")})
    assert only(examine(machine), "Published", label).state == "ok"


INFO = '{\\"plugin\\": \\"SSDNMS\\", \\"tensorrt\\": \\"10.16.1\\"}'
SOURCE = f'extern "C" char const* ssdNmsPluginInfo() {{ return "{INFO}"; }}'


def compiled(source: str, target: Path, *options: str) -> None:
    compiler = next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    target.with_suffix(".cpp").write_text(source)
    command = [compiler, "-shared", "-fPIC", str(target.with_suffix(".cpp")), "-o", str(target), *options]
    subprocess.run(command, check=True)


def test_a_real_library_is_asked_what_it_is(machine: Machine) -> None:
    machine.run = looks.run
    compiled(SOURCE, machine.libraries / "libssd_nms.so")
    finding = only(examine(machine), "Plugins", "libssd_nms.so")
    assert (finding.state, finding.text) == ("ok", "plugin SSDNMS, tensorrt 10.16.1")


def test_a_library_that_crashes_or_lacks_something_does_not_take_doctor_along(machine: Machine) -> None:
    machine.run = looks.run
    missing = f'char const* marker = "SSD_NMS_PLUGIN_INFO:{INFO}";'
    compiled(f"extern int nowhere(); {missing} int call() {{ return nowhere(); }}", machine.libraries / "liba.so")
    crash = "__attribute__((constructor)) void start() { __builtin_trap(); }"
    compiled(crash, machine.libraries / "libb.so")
    findings = examine(machine)
    assert "tensorrt 10.16.1; it cannot be loaded here" in only(findings, "Plugins", "liba.so").text
    assert "is no plugin" in only(findings, "Plugins", "libb.so").text


def test_a_taken_port_and_leftover_shared_memory(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        machine.ports = [taken.getsockname()[1]]
        assert only(examine(machine), "Resources", f"port {machine.ports[0]}").state == "warning"
    (machine.shm / "ssd-triton-0123456789ab-1").write_bytes(b"x" * 5000)
    (machine.shm / "ssd-triton-0123456789ab-2").write_bytes(b"x")
    (machine.shm / "ssd-triton-ba9876543210-1").write_bytes(b"x")
    (machine.shm / "somebody-elses").write_bytes(b"x")
    monkeypatch.setattr(looks, "used_regions", lambda: {str(machine.shm / "ssd-triton-ba9876543210-1")})
    finding = only(examine(machine), "Resources", "leftovers")
    assert "2 regions" in finding.text
    assert finding.fix.endswith(f"rm {machine.shm}/ssd-triton-0123456789ab-*")


def test_regions_in_use_are_seen() -> None:
    path = looks.SHM / "ssd-doctor-test"
    if not looks.SHM.is_dir():
        pytest.skip("needs /dev/shm")
    with path.open("wb"):
        assert str(path) in looks.used_regions()
    path.unlink()
    assert str(path) not in looks.used_regions()


def test_exit_status_and_json(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.doctor(as_json=True, machine=machine) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["ok"] is True
    assert {"area", "name", "state", "text", "fix"} == set(data["findings"][0])
    published(machine, engine=ENGINE)
    assert doctor.doctor(as_json=True, machine=machine) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


def test_the_table_shows_all_of_it(machine: Machine) -> None:
    published(machine, name="odd[bold]", engine=ENGINE)
    console = Console(width=400, record=True, file=io.StringIO())
    assert doctor.doctor(machine=machine, console=console) == 1
    shown = " ".join(console.export_text().split())
    assert "not ready" in shown
    for finding in examine(replace(machine)):
        if finding.name != "leftovers":
            assert finding.name in shown


def test_imported_models_say_whether_they_were_proven(machine: Machine) -> None:
    proof = {"proven": True, "how": "its own NonMaxSuppression", "pictures": 5, "detections": 12}
    for name, text in (
        ("shown", json.dumps({"source": "a.onnx", "family": "nms-inside", "proof": proof})),
        (
            "open",
            json.dumps({"source": "b.onnx", "family": "yolov5", "proof": {"proven": False, "how": "no original"}}),
        ),
        ("broken", "{"),
    ):
        (machine.models / name).mkdir()
        (machine.models / name / "import.json").write_text(text)
    findings = doctor.examine(machine)
    shown = only(findings, "Models", "shown")
    assert (shown.state, shown.text) == (
        "ok",
        "imported from a.onnx (nms-inside): the same 12 detections on 5 pictures as its own NonMaxSuppression",
    )
    unproven = only(findings, "Models", "open")
    assert (unproven.state, "NOT PROVEN against its original: no original" in unproven.text) == ("info", True)
    assert only(findings, "Models", "broken").state == "warning"
