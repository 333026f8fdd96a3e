"""The tritonserver of this machine: where its parts are, whether they can run, and what their log means.

It is the one on PATH (NVIDIA's container), else the one inside the PyPI wheel `nvidia-pytriton`.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from build.errors import ServeError
from build.files import relative
from build.publish import staging
from build.tensorrt.plugins import PLUGIN

SHM_PREFIX = "ssd-triton"  # of every name that the server and its stubs use in /dev/shm

# What tritonserver logs as warning or error on every machine without an NVIDIA GPU.
_HARMLESS = re.compile(
    "Unable to allocate pinned system memory|CUDA memory pool disabled|CudaDriverHelper has not been initialized"
    "|Failed to initialize NVML|DCGM unable to start"
    f"|ignore version directory '{re.escape(staging.NAME)}'"  # a version that is being written
)
_TABLE = re.compile(r"^\+[-+]+\+?$|^\|.*\|$|^[IWE]\d{4} \S+ \d+ \S+\]\s*$|^\s*$")

# What the log has, why that is, and what to do about it. The first match counts; {0} is what its group caught.
_OF_THE_LOADER = (
    (
        r"error while loading shared libraries: (lib(?:python)\S+?):",
        "the python backend's stub needs {0}: this Python was built without its shared library, or it is not installed",
        "use a Python that has it (Debian, Ubuntu: package libpython3.X; pyenv: PYTHON_CONFIGURE_OPTS=--enable-shared)",
    ),
    (
        r"error while loading shared libraries: (\S+?):",
        "{0} is not on this machine",
        "install the package that holds it, or serve from NVIDIA's container",
    ),
    (
        r"version `(GLIBC\S*)' not found",
        "this tritonserver needs {0}, newer than this machine's C library",
        "serve from NVIDIA's container nvcr.io/nvidia/tritonserver, or on Ubuntu 22.04, Debian 12 or newer",
    ),
)
_CAUSES = (
    *_OF_THE_LOADER,
    (
        r"Socket '(\S+)' already in use",
        "another program took {0} between the check and the start",
        "start again, or choose other ports",
    ),
    (
        r"(?:find|No importer registered for|creator for) [^\n]*\b(SSDNMS)\b",
        "the plugin library that holds {0} was not loaded into the server",
        f"build {relative(PLUGIN)} (see plugins/) or start tritonserver with LD_PRELOAD naming it",
    ),
    (
        r"unable to find backend library for backend '(ssd_onnxruntime)'",
        "the server's backend folder lacks {0}",
        "./invoke serve passes this project's backends/; a tritonserver of your own needs it, too (docs/design.md)",
    ),
    (
        r"unable to find backend library for backend '(\w+)'",
        "this tritonserver comes without the {0} backend",
        "serve from NVIDIA's container, or publish for the CPU: ./invoke build-engines --runtime onnxruntime",
    ),
    (
        r"(No space left on device|Failed to (?:initialize|increase) the shared memory\b[^\n\"]*)",
        "{0}: /dev/shm is too small for the model's instances",
        "enlarge it (docker run --shm-size=1g) or publish with fewer instances",
    ),
    (r"failed to stat file (\S+)", "the repository {0} is not there", "publish a model first: ./invoke build-engines"),
)


_WHEELS = {"0.7.0": "2.51.0"}  # nvidia-pytriton → the tritonserver inside (its release notes)


@dataclass(frozen=True)
class Installation:
    """The parts of a tritonserver on this machine.

    Attributes:
        binary: the tritonserver program.
        backends: its backend folder.
        stub: the python backend's program for the Python that runs now.
        from_wheel: whether the parts are the PyPI wheel's, which need the overlay.
    """

    binary: Path
    backends: Path
    stub: Path
    from_wheel: bool

    @property
    def version(self) -> str:
        """Its version, without starting it; empty where no file and no variable has it."""
        with contextlib.suppress(OSError, importlib.metadata.PackageNotFoundError):
            if self.from_wheel:
                return _WHEELS.get(importlib.metadata.version("nvidia-pytriton"), "")
            return (self.binary.parent.parent / "TRITON_VERSION").read_text().strip()
        return "" if self.from_wheel else os.environ.get("TRITON_SERVER_VERSION", "")

    def overlay(self, folder: Path, backends: Path) -> Path:
        """Joins the server's own backends and those of this project to one backend folder inside `folder`.

        It is made of symbolic links, because a copied stub would no longer find the libraries beside it.

        Args:
            folder: gets it.
            backends: this project's, one folder each.
        """
        joined = folder / "backends"
        python = joined / "python"
        joined.mkdir()
        for own in sorted(path for path in (*self.backends.glob("*"), *backends.glob("[!.]*")) if path.is_dir()):
            if own.name != "python" or not self.from_wheel:
                (joined / own.name).unlink(missing_ok=True)
                (joined / own.name).symlink_to(own.resolve())
        if self.from_wheel:  # its stub lies in a place of its own
            python.mkdir()
            for part in (*(self.backends / "python").iterdir(), self.stub):
                (python / part.name).symlink_to(part)
        return joined


def find() -> Installation:
    """The tritonserver on PATH, else the one in the installed wheel.

    Raises:
        ServeError: there is none, or the wheel has no stub for this version of Python.
    """
    program = shutil.which("tritonserver")
    if program:
        binary = Path(program).resolve()
        backends = binary.parent.parent / "backends"
        return Installation(binary, backends, backends / "python" / "triton_python_backend_stub", from_wheel=False)
    spec = importlib.util.find_spec("pytriton")
    base = Path(spec.origin).parent / "tritonserver" if spec and spec.origin else None
    if base is None or not (base / "bin" / "tritonserver").is_file():
        raise ServeError(
            "no tritonserver on PATH, and the wheel that carries one (nvidia-pytriton) is not installed",
            why="the environment was not made by ./invoke, or the wheel has no build for this machine (Linux x86_64)",
            fix="run through ./invoke, or inside the container nvcr.io/nvidia/tritonserver",
        )
    stubs = base / "python_backend_stubs"
    stub = stubs / f"{sys.version_info.major}.{sys.version_info.minor}" / "triton_python_backend_stub"
    if not stub.is_file():
        held = ", ".join(sorted((path.name for path in stubs.glob("3.*")), key=lambda name: int(name.split(".")[1])))
        raise ServeError(
            f"the server in nvidia-pytriton has no stub for Python {stub.parent.name}; it has {held}",
            fix="make the environment with one of these Pythons",
        )
    return Installation(base / "bin" / "tritonserver", base / "backends", stub, from_wheel=True)


def environment() -> dict[str, str]:
    """The server's environment, in which its stub finds this Python, its packages and its library."""
    variables = dict(os.environ)
    variables["PATH"] = os.pathsep.join([str(Path(sys.prefix) / "bin"), variables.get("PATH", os.defpath)])
    library = sysconfig.get_config_var("LIBDIR")
    variables["LD_LIBRARY_PATH"] = ":".join(filter(None, [variables.get("LD_LIBRARY_PATH"), library]))
    # numpy's BLAS would make a thread per core in every instance; the model runs none of it.
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        variables.setdefault(name, "1")
    return variables


def usage(program: Path, variables: Mapping[str, str]) -> str:
    """What `program` prints of its options; what the loader refuses shows here, not as a server that hangs.

    Args:
        program: tritonserver, or the python backend's stub.
        variables: its environment.

    Raises:
        ServeError: it cannot run on this machine.
    """
    try:
        done = subprocess.run(
            [str(program), "--help"], env=variables, capture_output=True, text=True, errors="replace", timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ServeError(f"{program} cannot run: {error}", fix="install tritonserver again") from error
    output = done.stdout + done.stderr
    refusal = cause(output, _OF_THE_LOADER)
    if refusal:
        raise ServeError(f"{program} cannot run on this machine", why=refusal[0], fix=refusal[1])
    if done.returncode < 0:
        raise ServeError(f"{program} ended with signal {-done.returncode}", why=output.strip()[-300:])
    return output


def preload(folder: Path) -> str:
    """LD_PRELOAD for a server of plans that hold SSDNMS: what is set already, and the plugin where it was built.

    Args:
        folder: the server's own; it gets a link to the plugin, since LD_PRELOAD cannot name a path with a space.
    """
    names = [os.environ.get("LD_PRELOAD", "")]
    if PLUGIN.is_file():
        link = folder / PLUGIN.name
        link.symlink_to(PLUGIN)
        names.append(str(link))
    return ":".join(filter(None, names))


def worth_reading(lines: Iterable[str]) -> list[str]:
    """A log's lines without its tables and without what it has on every machine that has no GPU."""
    return [line.rstrip() for line in lines if not _HARMLESS.search(line) and not _TABLE.match(line)]


def first_part(message: str) -> str:
    """The message without the place in model.py that the python backend puts after it."""
    return re.split(r"(?:\\n|\n){2}At:", message)[0]


def cause(text: str, causes: Iterable[tuple[str, str, str]] | None = None) -> tuple[str, str] | None:
    """Why a server failed and what to do about it, as far as its log gives that away; the first cause that matches."""
    for pattern, why, fix in _CAUSES if causes is None else causes:
        match = re.search(pattern, text)
        if match:
            return why.format(match[1]), fix
    return None
