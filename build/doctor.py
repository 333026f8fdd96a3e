"""`invoke doctor`: what is on this machine, what is published, whether the two fit, and what to do where they do not.

It works without a GPU, TensorRT, tritonserver or a published model, changes nothing, and imports neither CUDA nor a
plugin into its own process: whatever can crash runs in a process of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import platform
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build import serve, spec, tritonserver
from build.contract import Target
from build.errors import SSDError
from build.files import IMPORT_FILE, ROOT, relative, sha256
from build.machine import (
    PACKAGES,
    Machine,
    ask_plugin,
    find_gpu,
    package_version,
    tensorrt_version,
    unresolvable,
    unused_regions,
)
from build.publish import backend, picture, repository
from build.releases import SUPPORT_MATRIX, numbers, release_of, same_minor
from build.tensorrt import plan, plugins
from build.tensorrt.cuda import Gpu, driver_version
from build.tensorrt.system import system_tensorrt

if TYPE_CHECKING:
    from rich.console import Console

STATES = ("ok", "info", "warning", "problem")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        area: a heading, such as `GPU`.
        name: what was looked at.
        state: ok; info: no fault, but good to know; warning: works for now; problem: does not work.
        text: what is so.
        fix: what to do; never empty for a warning or a problem.
    """

    area: str
    name: str
    state: str
    text: str
    fix: str = ""


def doctor(*, as_json: bool = False, machine: Machine | None = None, console: Console | None = None) -> int:
    """Looks at everything and prints the findings.

    Returns:
        1 if there is a problem, else 0.
    """
    findings = examine(machine or Machine())
    bad = any(finding.state == "problem" for finding in findings)
    if as_json:
        print(json.dumps({"ok": not bad, "findings": [dataclasses.asdict(finding) for finding in findings]}, indent=2))
    else:
        show(findings, console)
    return int(bad)


def examine(machine: Machine) -> list[Finding]:
    """All findings, by area. An examination that fails is a finding itself."""
    findings: list[Finding] = []
    gpu: Gpu | None = None
    with contextlib.suppress(SSDError):
        gpu = find_gpu(machine)
    tensorrt = tensorrt_version()
    parts: tuple[tuple[str, Callable[[], Iterable[Finding]]], ...] = (
        ("Python", _python),
        ("GPU", lambda: _gpu(machine, gpu)),
        ("TensorRT", lambda: _tensorrt(machine)),
        ("Triton", lambda: _triton(machine)),
        ("Plugins", lambda: _plugins(machine)),
        ("Models", lambda: _models(machine)),
        ("Published", lambda: _published(machine, gpu, tensorrt)),
        ("Resources", lambda: _resources(machine)),
    )
    for area, look in parts:
        try:
            findings += look()
        except SSDError as error:
            findings.append(Finding(area, area, "problem", error.what, error.fix or error.why or "see above"))
        except OSError as error:
            findings.append(
                Finding(area, area, "problem", f"cannot be looked at: {error}", "check the rights of that file")
            )
    return findings


# -- this machine ------------------------------------------------------------------------------------------------------


def _python() -> Iterator[Finding]:
    version = platform.python_version()
    low, high = (3, 10), (3, 13)
    if low <= sys.version_info[:2] <= high:
        yield Finding("Python", "Python", "ok", version)
    else:
        asked = f"{'.'.join(map(str, low))} to {'.'.join(map(str, high))}"
        yield Finding(
            "Python", "Python", "problem", f"{version}, but {asked} is needed", "make .venv with such a Python"
        )
    for package in PACKAGES:
        installed = package_version(package)
        if installed:
            yield Finding("Python", package, "ok", installed)
        else:
            yield Finding("Python", package, "problem", "not installed", "run through ./invoke, which installs it")


def _gpu(machine: Machine, gpu: Gpu | None) -> Iterator[Finding]:
    if gpu is not None:
        memory = f", {gpu.memory_mib / 1024:.0f} GiB" if gpu.memory_mib else ""
        yield Finding("GPU", "GPU", "ok", f"{gpu.name}, compute capability {gpu.compute_capability}{memory}")
        cuda = f"{gpu.driver}, for CUDA up to {gpu.cuda_driver}" if gpu.cuda_driver else gpu.driver
        yield Finding("GPU", "driver", "ok", cuda)
    elif driver_version() or any(Path("/dev").glob("nvidia[0-9]*")):
        _, output = machine.run(["nvidia-smi"])
        text = f"there is a driver ({driver_version() or 'unknown version'}), but nvidia-smi answers: {output[:200]}"
        fix = "restart the driver or the machine; in a container, start it with --gpus all"
        yield Finding("GPU", "GPU", "problem", text, fix)
    else:
        text = "no NVIDIA GPU or driver: models are served on the CPU"
        yield Finding(
            "GPU", "GPU", "info", text, "nothing, or for TensorRT: a machine with one (containers: --gpus all)"
        )
    toolkit = plugins.find_nvcc()
    if toolkit is None:
        text = "no CUDA compiler: the plugin's GPU code cannot be built here"
        yield Finding("GPU", "nvcc", "info", text, "only to build the plugin: install the CUDA toolkit")
    else:
        release = re.search(r"release ([\d.]+)", machine.run([str(toolkit), "--version"])[1])
        yield Finding("GPU", "nvcc", "ok", f"{release[1] if release else 'unknown version'} at {toolkit}")


def _tensorrt(machine: Machine) -> Iterator[Finding]:
    pip, system, container = tensorrt_version(), system_tensorrt(machine.run), os.environ.get("TENSORRT_VERSION", "")
    container = container or os.environ.get("NV_TENSORRT_VERSION", "")
    if pip and importlib.util.find_spec("tensorrt") is not None:
        status, output = machine.run([sys.executable, "-c", "import tensorrt; print(tensorrt.__version__)"])
        if status == 0:
            yield Finding("TensorRT", "Python package", "ok", output.splitlines()[-1])
        else:
            text = f"{pip} is installed, but cannot be imported: {output.splitlines()[-1] if output else status}"
            yield Finding("TensorRT", "Python package", "problem", text, "install it again, for this CUDA version")
    else:
        text = "not installed: plans cannot be built or checked here"
        yield Finding("TensorRT", "Python package", "info", text, "only for plans: ./invoke install-tensorrt")
    for where, version in (("system libraries", system), ("container", container)):
        if version:
            yield Finding("TensorRT", where, "ok", version)
    different = {numbers(version)[:2] for version in (pip, system) if version}
    if len(different) > 1:
        text = f"the package is {pip}, the system has {system}: a plan of one does not load in the other"
        yield Finding("TensorRT", "two versions", "warning", text, "build plans with the version that the server has")


def _triton(machine: Machine) -> Iterator[Finding]:
    try:
        installed = tritonserver.find()
    except SSDError as error:
        yield Finding("Triton", "tritonserver", "problem", error.what, error.fix)
        return
    version = installed.version
    where = "in the wheel nvidia-pytriton" if installed.from_wheel else str(installed.binary)
    yield Finding("Triton", "tritonserver", "ok", f"{version or 'unknown version'} {where}")
    chosen = backend.look(backends=machine.backends)
    native = chosen.name == backend.NATIVE
    state, fix = ("ok", "") if native else ("info", backend.SLOWER)
    yield Finding("Triton", "backend for the CPU", state, f"{chosen.name}: {chosen.why}", fix)
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    if installed.stub.is_file():
        yield Finding("Triton", "stub of the python backend", "ok", f"for Python {python}")
    else:
        fix = f"use NVIDIA's container, or add a stub for Python {python} (docs of Triton's python_backend)"
        state = "info" if native else "problem"
        yield Finding("Triton", "stub of the python backend", state, f"{installed.stub} is missing", fix)
    if installed.from_wheel:
        libc = platform.libc_ver()[1]
        if libc and numbers(libc) < (2, 35):
            fix = "Ubuntu 22.04, Debian 12 or newer, or NVIDIA's container"
            yield Finding("Triton", "C library", "problem", f"glibc {libc}, but the wheel needs 2.35", fix)
    release = release_of(version)
    has_backend = (installed.backends / "tensorrt").is_dir()
    if release is None:
        if version:
            text = f"which TensorRT {version} has is not in our table"
            yield Finding("Triton", "its TensorRT", "info", text, f"see {SUPPORT_MATRIX}")
    else:
        note = "" if release.confirmed else " (not confirmed by a source)"
        text = f"{release.tensorrt}{note}, CUDA {release.cuda}, as in container {release.container}"
        text += "" if has_backend else "; this installation has no tensorrt backend"
        pip = tensorrt_version()
        same = not pip or same_minor(pip, release.tensorrt)
        if same or not has_backend:
            yield Finding("Triton", "its TensorRT", "ok" if has_backend else "info", text, f"source: {release.source}")
        else:
            fix = f"build with TensorRT {release.tensorrt}, or serve from the container that has {pip}"
            yield Finding("Triton", "its TensorRT", "problem", f"{text}, but plans are built here with {pip}", fix)


# -- plugins -----------------------------------------------------------------------------------------------------------


def _plugins(machine: Machine) -> Iterator[Finding]:
    libraries = [path for path in sorted(machine.libraries.glob("*.so")) if not _without_tensorrt(path)]
    preloaded = [Path(item) for item in re.split(r"[: ]", os.environ.get("LD_PRELOAD", "")) if item]
    for path in preloaded:
        if not path.is_file():
            text = "LD_PRELOAD names it, but it is not there: the loader only warns"
            yield Finding("Plugins", path.name, "warning", text, f"correct LD_PRELOAD, or put the file at {path}")
    for path in dict.fromkeys([*libraries, *(path for path in preloaded if path.is_file() and "nms" in path.name)]):
        info, refused = ask_plugin(machine, path)
        if not info:
            text = f"is no plugin that doctor knows: {refused}"
            fix = "other plugins load at serve time; if this should be SSDNMS: ./invoke build-plugins"
            yield Finding("Plugins", path.name, "warning", text, fix)
            continue
        what = ", ".join(f"{key} {value}" for key, value in info.items() if value)
        if refused:
            text = f"{what}; it cannot be loaded here: {refused}"
            fix = f"load it where TensorRT {info.get('tensorrt', '')} is, or build it for the one that is here"
            yield Finding("Plugins", path.name, "warning" if tensorrt_version() else "info", text, fix)
        else:
            yield Finding("Plugins", path.name, "ok", what)
    if not libraries:
        text = f"no plugin library in {relative(machine.libraries)}: plans with SSDNMS cannot be built or served"
        yield Finding("Plugins", "libssd_nms.so", "info", text, "only for TensorRT: ./invoke build-plugins")


def _without_tensorrt(library: Path) -> bool:
    """The CPU reference and the CUDA core, which are no plugins."""
    return library.name in ("libssd_nms_reference.so", "libssd_nms_core.so")


# -- what is published -------------------------------------------------------------------------------------------------


def _models(machine: Machine) -> Iterator[Finding]:
    """Imported models: whether each was compared with its original."""
    for path in sorted(machine.models.glob(f"*/{IMPORT_FILE}")):
        try:
            about = json.loads(path.read_text(encoding="utf-8-sig"))
            proof = about["proof"]
            text = f"imported from {about['source']} ({about['family']}): "
            if proof["proven"]:
                detections = f"{proof['detections']} detections on {proof['pictures']} pictures"
                yield Finding("Models", path.parent.name, "ok", f"{text}the same {detections} as {proof['how']}")
            else:
                fix = "look at its detections on pictures of yours, or import it again where the original can run"
                yield Finding(
                    "Models", path.parent.name, "info", f"{text}NOT PROVEN against its original: {proof['how']}", fix
                )
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            fix = "import it again: ./invoke import-model"
            yield Finding("Models", path.parent.name, "warning", f"{path.name} cannot be read: {error!r}", fix)


def _published(machine: Machine, gpu: Gpu | None, tensorrt: str) -> Iterator[Finding]:
    folders = sorted(path for path in machine.repository.glob("*") if path.is_dir())
    names = [path.name for path in folders if repository.is_published(path)]
    if not names:
        text = f"nothing in {relative(machine.repository)}"
        yield Finding("Published", "models", "info", text, "publish: ./invoke build-engines")
    for name in names:
        folder = machine.repository / name
        if owner := picture.owner(folder):
            fault, again = repository.fault(folder), f"./invoke build-engines --model {owner} --force"
            yield from [Finding("Published", name, "problem", fault, again)] * bool(fault)
            continue
        served = repository.served_version(machine.repository, name)
        versions = sorted(int(path.name) for path in folder.glob("*") if path.name.isdecimal() and path.is_dir())
        fault = repository.fault(folder)
        if served is None or served not in versions:
            text = fault or f"{repository.CONFIG} names version {served}, there are {versions}"
            yield Finding("Published", name, "problem", text, f"./invoke build-engines --model {name} --force")
            continue
        if fault and not repository.damage(folder / str(served)):
            yield Finding("Published", name, "problem", fault, f"./invoke build-engines --model {name} --force")
        for version in versions:
            where = f"{name} version {version}{', served' if version == served else ''}"
            yield from _version(machine, folder / str(version), where, version == served, gpu, tensorrt)


def _version(
    machine: Machine, folder: Path, where: str, served: bool, gpu: Gpu | None, tensorrt: str
) -> Iterator[Finding]:
    name = folder.parent.name
    again = f"./invoke build-engines --model {name} --force"
    damage = repository.damage(folder)
    if damage:
        fix = again if served else f"it cannot be rolled back to: {again}"
        yield Finding("Published", where, "problem" if served else "warning", damage, fix)
        return
    manifest: dict[str, Any] = json.loads((folder / repository.MANIFEST).read_bytes())
    runtime, precision = manifest.get("runtime", ""), manifest.get("precision", "")
    count = len(manifest.get("files", {}))
    text = f"{precision}, {runtime}, {manifest.get('built', '')}; {count} files as published (SHA-256)"
    yield Finding("Published", where, "ok", text)
    if served and repository.carries_libraries(folder):
        text = "holds libraries, as older builds published: a server that runs loses memory with each publish"
        yield Finding("Published", f"{where}: libraries", "warning", text, again)
    if served:
        yield from _stale(machine, name, manifest)
        yield from _backend(machine, where, manifest)
    engine = manifest.get("engine")
    if isinstance(engine, dict) and served:
        yield from _plan(machine, where, engine, gpu, tensorrt, again)


def _backend(machine: Machine, where: str, manifest: Mapping[str, Any]) -> Iterator[Finding]:
    """Whether the installed backend is the one that a version was tested with."""
    tested = manifest.get("libraries")
    if not tested:
        return
    label = f"{where}: backend"
    damage = backend.damage(machine.backends)
    if damage:
        yield Finding("Published", label, "problem", damage, backend.AGAIN)
    elif not tested.items() <= backend.installed(machine.backends)["files"].items():
        text = f"it was tested with other libraries than {relative(machine.backends / backend.NATIVE)} has now"
        yield Finding("Published", label, "warning", text, "test it with these: ./invoke verify, or build it again")
    else:
        yield Finding("Published", label, "ok", f"{relative(machine.backends / backend.NATIVE)} as it was tested with")


def _stale(machine: Machine, name: str, manifest: Mapping[str, Any]) -> Iterator[Finding]:
    """Whether a build today would make something else."""
    if not (machine.models / name / "spec.toml").is_file():
        text = f"has no source in {relative(machine.models)}: it cannot be built again here"
        yield Finding("Published", f"{name}: source", "info", text, "keep its sources under models/")
        return
    try:
        source = spec.load(machine.models / name)
        target = Target.of(manifest)
        served_by = backend.of(manifest)
        if served_by:
            today = backend.look(source.serving.backend, machine.backends)
            other = served_by.engine != today.engine  # only a build can tell which it will be
            served_by = served_by if other or _is_open(today) else today
        changed = repository.changed(manifest, repository.recipe(source, target, served_by))
    except SSDError as error:
        fix = error.fix or f"see {relative(machine.models / name)}"
        yield Finding("Published", f"{name}: source", "problem", error.what, fix)
        return
    if changed:
        text = f"changed since: {', '.join(changed)}"
        yield Finding("Published", f"{name}: source", "warning", text, f"./invoke build-engines --model {name}")
    else:
        yield Finding("Published", f"{name}: source", "ok", "unchanged since this version was built")


def _is_open(today: backend.Backend) -> bool:
    """Whether only a build can tell which backend it will be."""
    return today.name == backend.NATIVE and not today.libraries


def _plan(
    machine: Machine, where: str, engine: Mapping[str, Any], gpu: Gpu | None, tensorrt: str, again: str
) -> Iterator[Finding]:
    """Whether a plan can run here, and whether its plugin can be had."""
    built = f"built for {engine['gpu']['name']} with TensorRT {engine['tensorrt']}"
    if gpu is None:
        text = f"{built}; there is no GPU here"
        yield Finding(
            "Published", f"{where}: plan", "problem", text, "serve it where that GPU is, or publish for the CPU"
        )
    else:
        reason = plan.foreign(engine, gpu, tensorrt or engine["tensorrt"])
        state, fix = ("problem", again) if reason else ("ok", "")
        yield Finding("Published", f"{where}: plan", state, reason or built, fix)
    with contextlib.suppress(SSDError):
        release = release_of(tritonserver.find().version)
        if release and not same_minor(release.tensorrt, engine["tensorrt"]):
            text = f"{built}, but tritonserver {release.triton} has TensorRT {release.tensorrt}"
            fix = f"build with {release.tensorrt}, or serve from a container with {engine['tensorrt']}"
            yield Finding("Published", f"{where}: server", "problem", text, fix)
    needed = engine.get("plugin")
    if not needed:
        return
    library = machine.libraries / needed["file"]
    label = f"{where}: plugin"
    named = f"{needed['plugin']} version {needed['plugin_version']} from {needed['file']}"
    if not library.is_file():
        text = f"needs {named}, which is not in {relative(machine.libraries)}"
        yield Finding("Published", label, "problem", text, "./invoke build-plugins, then build the plan again")
    elif sha256(library) != needed["sha256"]:
        text = f"needs {named}, and the file there is another build of it"
        yield Finding("Published", label, "warning", text, f"put the old file back, or {again}")
    elif not tensorrt:
        text = f"needs {named}, which is there; without the package tensorrt this process cannot resolve it"
        yield Finding("Published", label, "info", text, f"serve it with LD_PRELOAD={library}")
    else:
        reason = unresolvable(machine, library, needed["plugin"], needed["plugin_version"])
        if reason:
            yield Finding("Published", label, "problem", f"needs {named}: {reason}", "./invoke build-plugins")
        else:
            yield Finding("Published", label, "ok", f"{named}; ./invoke serve loads it with LD_PRELOAD")


# -- what a server needs -----------------------------------------------------------------------------------------------


def _resources(machine: Machine) -> Iterator[Finding]:
    for port in machine.ports:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                text = serve.holder(port) or "another program listens there"
                fix = "stop it, or choose others: ./invoke serve --http-port 0 --grpc-port 0 --metrics-port 0"
                yield Finding("Resources", f"port {port}", "warning", text, fix)
            else:
                yield Finding("Resources", f"port {port}", "ok", "free")
    if not machine.shm.is_dir():
        yield Finding("Resources", "shared memory", "problem", f"{machine.shm} is not there", "mount a tmpfs there")
    else:
        shm = shutil.disk_usage(machine.shm)
        text = f"{shm.free / 2**20:,.0f} of {shm.total / 2**20:,.0f} MiB free in {machine.shm}"
        small = shm.free < 256 << 20
        fix = "enlarge it (docker run --shm-size=1g): every instance takes some" if small else ""
        state = "problem" if shm.free < 64 << 20 else "warning" if small else "ok"
        yield Finding("Resources", "shared memory", state, text, fix)
        yield from _leftovers(machine)
    disk = shutil.disk_usage(ROOT)
    text, small = f"{disk.free / 2**30:,.1f} GiB free", disk.free < 2 << 30
    fix = "free some space: a build keeps a model three times" if small else ""
    yield Finding("Resources", "disk", "warning" if small else "ok", text, fix)


def _leftovers(machine: Machine) -> Iterator[Finding]:
    left = unused_regions(machine)
    if not left:
        return
    size = 0
    for path in (path for paths in left.values() for path in paths):
        with contextlib.suppress(OSError):
            size += path.stat().st_blocks * 512
    text = f"{sum(map(len, left.values()))} regions ({size / 2**20:.0f} MiB) that no process of yours uses"
    fix = "if no server of another user runs: rm " + " ".join(str(machine.shm / name) for name in left)
    yield Finding("Resources", "leftovers", "warning", text, fix)


# -- showing it --------------------------------------------------------------------------------------------------------

_SIGNS = {"ok": "[green]✓[/]", "info": "[blue]·[/]", "warning": "[yellow]![/]", "problem": "[red]✗[/]"}


def show(findings: Sequence[Finding], console: Console | None = None) -> None:
    """Prints findings as a table, with a verdict below it."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = console or Console(highlight=False)
    table = Table(box=None, padding=(0, 1), show_header=False)
    table.add_column(width=1)
    table.add_column(overflow="fold", max_width=44)
    table.add_column(overflow="fold")
    area = ""
    for finding in findings:
        if finding.area != area:
            area = finding.area
            table.add_row("", f"[bold]{escape(area)}[/]")
        text = escape(finding.text)
        if finding.fix:
            text += f"\n[dim]→ {escape(finding.fix)}[/]"
        table.add_row(_SIGNS[finding.state], escape(finding.name), text)
    console.print(table)
    counts = {state: sum(finding.state == state for finding in findings) for state in STATES}
    verdict = "[red bold]not ready[/]" if counts["problem"] else "[green bold]ready[/]"
    console.print(f"\n{verdict}: {counts['problem']} problems, {counts['warning']} warnings, {counts['ok']} in order")
