"""Builds the NMS plugin (plugins/) as far as this machine's tools allow: reference, CUDA core, TensorRT plugin.

`build_plugins()` looks for what CMake needs, says what is missing, and runs CMake's presets.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from build.errors import SSDError
from build.files import ROOT
from build.tensorrt import system, toolchain

PLUGINS = ROOT / "plugins"
LIB = PLUGINS / "lib"
PLUGIN = LIB / "libssd_nms.so"
TENSORRT_REPOSITORY = "https://github.com/NVIDIA/TensorRT"
_SYSTEM_INCLUDES = ("/usr/include", "/usr/include/x86_64-linux-gnu", "/usr/include/aarch64-linux-gnu")
_SYSTEM_CUDA = Path("/usr/local/cuda")
_MARKER = b"SSD_NMS_PLUGIN_INFO:"


class PluginBuildError(SSDError):
    """The plugin could not be built, or what was asked for is not there."""


@dataclass(frozen=True)
class PluginBuild:
    """What was built.

    Attributes:
        stage: the furthest stage: `reference`, `core` or `plugin`.
        libraries: the files, the last one being the stage's own.
        missing: what kept it from going further, a sentence each.
    """

    stage: str
    libraries: tuple[Path, ...]
    missing: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"built {path} ({path.stat().st_size / 1024:.0f} KiB)" for path in self.libraries]
        if self.stage == "plugin":
            lines += [f"{name}: {value}" for name, value in plugin_info(self.libraries[-1]).items()]
        return "\n".join([*lines, *(f"not built: {reason}" for reason in self.missing)])


def build_plugins(
    *,
    tensorrt_source: str = "",
    tensorrt_ref: str = "",
    architectures: str = "",
    stage: str = "",
    output: Path = LIB,
    work: Path = PLUGINS / "out",
    bring: bool = False,
) -> PluginBuild:
    """Builds as far as nvcc and TensorRT's headers are at hand, with warnings as errors.

    Args:
        tensorrt_source: URL or path of a git repository with TensorRT's headers under include/ (default: NVIDIA's).
        tensorrt_ref: its tag or branch; without it the headers are those of TENSORRT_ROOT, of the system, or else, with
            `bring`, those of the TensorRT whose library the system has.
        architectures: such as "90" or "80,90-virtual"; empty: all from 7.5 to 12.1 that the compiler knows, and PTX.
        stage: `reference`, `core` or `plugin` if it must be that one; empty: the furthest that is possible.
        output: the folder for the libraries.
        work: the folder for CMake's own files.
        bring: whether CMake and nvcc are installed from PyPI (build/tensorrt/toolchain.py) where they are not here and
            the plugin, or a stage for the GPU, is what is built.

    Raises:
        PluginBuildError: no compiler or CMake, what `stage` asks for is not there, or the build failed.
    """
    if stage not in ("", "reference", "core", "plugin"):
        raise PluginBuildError(f"there is no stage {stage!r}", fix="take reference, core or plugin")
    architectures = architectures.replace(",", ";")
    if not re.fullmatch(r"|native|\d+[af]?(-real|-virtual)?(;\d+[af]?(-real|-virtual)?)*", architectures):
        raise PluginBuildError(
            f"architectures is {architectures!r}", fix='give numbers, such as "90" or "80,90-virtual"'
        )
    if re.search(r'["\\;]', f"{PLUGINS}{output}{work}"):
        raise PluginBuildError(
            f"CMake cannot build in {PLUGINS}", why='the name of a folder has ", ; or \\ in it', fix="rename the folder"
        )
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        raise PluginBuildError("there is no C++ compiler", fix="install g++, or set CXX")
    root = find_tensorrt(tensorrt_source, tensorrt_ref) if stage not in ("reference", "core") else None
    no_headers = ""
    if root is None and bring and stage not in ("reference", "core"):
        root, no_headers = _headers_of_the_server()
    nvcc = find_nvcc() if stage != "reference" else None
    cmake, ninja = shutil.which("cmake"), None
    refusal = ""
    if bring and (cmake is None or (nvcc is None and stage != "reference" and (root is not None or stage))):
        refusal = "" if nvcc is not None or root is None else _unfit(root)
        tools = toolchain.bring()
        cmake, ninja = cmake or str(tools.cmake), str(tools.ninja)
        nvcc = nvcc or (tools.nvcc if stage != "reference" and not refusal else None)
    if cmake is None:
        raise PluginBuildError("cmake is not on PATH", fix="pip install cmake, or the system's package cmake")

    settings = [f"-DSSD_NMS_OUTPUT={output}", f"-DSSD_NMS_ARCHITECTURES={architectures}"]
    if ninja is not None:
        settings += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    missing = []
    reached = "reference"
    if nvcc is None:
        missing.append(
            refusal
            or "the CUDA core: nvcc is not on PATH, in CUDA_HOME, in /usr/local/cuda or in this Python's packages "
            "(--stage core brings one)"
        )
    else:
        reached = "core"
        settings.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
        if shutil.which("gcc") is None:  # which nvcc would ask for
            settings.append(f"-DCMAKE_CUDA_HOST_COMPILER={compiler}")
    if root is None:
        missing.append(
            no_headers
            or "the TensorRT plugin: NvInfer.h is neither in TENSORRT_ROOT/include nor in the system's include folders "
            "(--tensorrt-ref v10.16 fetches the headers of that release from NVIDIA's public repository)"
        )
    elif nvcc is not None:
        reached = "plugin"
        settings.append(f"-DTENSORRT_ROOT={root}")
    if stage and reached != stage:
        raise PluginBuildError(f"the stage {stage} cannot be built here", why="\n".join(missing))
    if stage:
        missing.clear()

    folder = work / reached
    # CMake keeps what it found the last time, and with another compiler it forgets what it was told.
    stamp, state = folder / "settings.txt", "\n".join([*settings, _run([str(nvcc), "--version"]) if nvcc else ""])
    if not stamp.is_file() or stamp.read_text() != state:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    libraries = _libraries_of(nvcc)
    _run([cmake, "-S", str(PLUGINS), "--preset", reached, "-B", str(folder), *settings], libraries)
    stamp.write_text(state)
    _run([cmake, "--build", str(folder), "--parallel", str(os.cpu_count() or 1)], libraries)
    names = ["libssd_nms_reference.so", "libssd_nms_core.so", "libssd_nms.so"]
    count = ("reference", "core", "plugin").index(reached) + 1
    return PluginBuild(reached, tuple(output / name for name in names[:count]), tuple(missing))


def _headers_of_the_server() -> tuple[Path | None, str]:
    """The headers of the TensorRT whose library the system has: fetched before, or now; else None, and why."""
    version = system.system_tensorrt()
    if not version:
        return None, ""
    fetched = {headers_version(path.parent.parent): path.parent.parent for path in _cache().glob("*/include/NvInfer.h")}
    known = system.tag_of(version, [f"v{number}" for number in fetched if number])
    if known:
        return fetched[known[1:]], ""
    lacking = f"the TensorRT plugin: this machine has TensorRT {version} without its headers"
    git = shutil.which("git")
    if git is None:
        return None, f"{lacking}, and no git to fetch them with"
    try:
        listed = _run([git, "ls-remote", "--tags", "--refs", TENSORRT_REPOSITORY])
        tag = system.tag_of(version, [line.rpartition("/")[2] for line in listed.splitlines()])
        if tag:
            return _fetched(TENSORRT_REPOSITORY, tag), ""
    except PluginBuildError as error:
        return None, f"{lacking}, and they cannot be fetched: {error.why.splitlines()[0] if error.why else error.what}"
    return None, f"{lacking}, and {TENSORRT_REPOSITORY} has none of it (--tensorrt-ref TAG takes another release's)"


def _unfit(root: Path) -> str:
    """Why PyPI's nvcc is of the wrong CUDA for a TensorRT; empty where it is not.

    CUDA's major version is that of the driver for which the TensorRT was made: code of a later one would not start.
    """
    version = headers_version(root)
    cuda = system.cuda_of(version)
    if not version or cuda.split(".")[0] == toolchain.CUDA_MAJOR:
        return ""
    return (
        f"the CUDA core: TensorRT {version} is of CUDA {cuda}, of which PyPI has no nvcc: "
        f"install the toolkit of CUDA {cuda} (NVIDIA's package cuda-nvcc-{cuda.replace('.', '-')} with "
        "cuda-cudart-dev), or set CUDA_HOME"
    )


def headers_version(root: Path) -> str:
    """The version of the TensorRT headers in a folder; empty where it cannot be read."""
    folders = [root / "include", *(map(Path, _SYSTEM_INCLUDES) if root == Path("/usr") else ())]
    for folder in folders:
        with contextlib.suppress(OSError):
            text = (folder / "NvInferVersion.h").read_text()
            parts = ("MAJOR", "MINOR", "PATCH")
            found = [re.search(rf"define (?:NV_TENSORRT_{part}|TRT_{part}_ENTERPRISE) (\d+)", text) for part in parts]
            return ".".join(match[1] for match in found if match)
    return ""


def find_nvcc() -> Path | None:
    """CUDA's compiler: on PATH, in CUDA_HOME or CUDA_PATH, /usr/local/cuda, a Python package, or brought before."""
    on_path = shutil.which("nvcc")
    if on_path:
        return Path(on_path)
    folders = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders += [
        _SYSTEM_CUDA,
        *sorted(Path(sysconfig.get_path("purelib"), "nvidia").glob("cu*"), reverse=True),
    ]
    tools = toolchain.tools()
    brought = tools.nvcc if tools else None
    return next((nvcc for folder in folders if os.access(nvcc := folder / "bin" / "nvcc", os.X_OK)), brought)


def find_tensorrt(source: str = "", ref: str = "") -> Path | None:
    """A folder with include/NvInfer.h: what source and ref name, else TENSORRT_ROOT, else the system's.

    Raises:
        PluginBuildError: what was named is not there.
    """
    if source and not ref:
        raise PluginBuildError("a TensorRT source needs a tag or branch, too", fix="add --tensorrt-ref, such as v10.16")
    if ref:
        return _fetched(source or TENSORRT_REPOSITORY, ref)
    root = os.environ.get("TENSORRT_ROOT", "")
    if root:
        if not Path(root, "include", "NvInfer.h").is_file():
            raise PluginBuildError(
                f"TENSORRT_ROOT is {root}, but there is no include/NvInfer.h in it", fix="correct it, or unset it"
            )
        return Path(root)
    return Path("/usr") if any(Path(folder, "NvInfer.h").is_file() for folder in _SYSTEM_INCLUDES) else None


def _cache() -> Path:
    """Where fetched headers are kept, one folder for each release."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ssd-on-triton" / "tensorrt"


def _fetched(source: str, ref: str) -> Path:
    """The headers of a release, from the user's cache folder or else from the repository."""
    cache = _cache()
    name = re.sub(r"[^\w.-]", "_", ref)
    root = cache / f"{name}-{hashlib.sha256(f'{source} {ref}'.encode()).hexdigest()[:8]}"
    if (root / "include" / "NvInfer.h").is_file():
        return root
    git = _need("git", "install git, or set TENSORRT_ROOT to a folder with include/NvInfer.h")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        clone = Path(scratch, "clone")
        sparse = ["--depth=1", "--filter=blob:none", "--sparse"]
        url = Path(source).resolve().as_uri() if Path(source).exists() else source
        _run([git, "clone", "--quiet", *sparse, f"--branch={ref}", "--", url, str(clone)])
        _run([git, "-C", str(clone), "sparse-checkout", "set", "include"])
        if not (clone / "include" / "NvInfer.h").is_file():
            raise PluginBuildError(f"{source} has no include/NvInfer.h at {ref}", fix="name a release of TensorRT")
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(clone / "include", Path(scratch, "whole", "include"))
        Path(scratch, "whole").rename(root)
    return root


def plugin_info(library: Path) -> dict[str, str]:
    """What libssd_nms.so says of itself (versions of TensorRT, CUDA and the source), read without loading it.

    Raises:
        PluginBuildError: the file is not there or is not this plugin.
    """
    try:
        content = library.read_bytes()
    except OSError as error:
        raise PluginBuildError(f"{library} cannot be read: {error}", fix="./invoke build-plugins") from error
    start = content.find(_MARKER)
    if start < 0:
        raise PluginBuildError(f"{library} is not the SSDNMS plugin", fix="./invoke build-plugins")
    start += len(_MARKER)
    info: dict[str, str] = json.loads(content[start : content.index(b"\0", start)])
    return info


def _need(tool: str, fix: str) -> str:
    path = shutil.which(tool)
    if path is None:
        raise PluginBuildError(f"{tool} is not on PATH", fix=fix)
    return path


def _libraries_of(nvcc: Path | None) -> dict[str, str]:
    """Where the linker finds CUDA's libraries: PyPI's packages have them in lib/, but nvcc looks in lib64/."""
    folder = nvcc.resolve().parent.parent / "lib" if nvcc else None
    if folder is None or not (folder / "libcudart_static.a").is_file():
        return {}
    return {"LIBRARY_PATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("LIBRARY_PATH", "")]))}


def _run(command: Sequence[str], variables: Mapping[str, str] | None = None) -> str:
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C", **(variables or {})}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        lines = (done.stdout + done.stderr).strip().splitlines()
        errors = [
            line for line in lines if re.search(r"\b(error|fatal)\b", line, re.I) and not re.match("g?make", line)
        ]
        raise PluginBuildError(
            f"{' '.join(command)} ended with {done.returncode}", why="\n".join([*errors[:10], "...", *lines[-15:]])
        )
    return done.stdout
