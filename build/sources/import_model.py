"""`invoke import-model`: somebody else's detector → models/<name>/ with model.onnx, spec.toml, labels.txt, anchors.npy.

torchvision's two SSDs are exported up to their raw heads, with all that their post-processing needs in spec.toml. Any
other detector comes as its ONNX file: `foreign` recognises and adapts it, `prove` compares it with the original. The
folder is filled and checked beside the models, and renamed into place at the end.
"""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build import files, spec
from build.errors import ImportModelError, OptionError, SSDError
from build.files import ARTIFACTS, MODELS
from build.gate import datasets
from build.gate.self_check import self_check
from build.graph.attach import attach
from build.sources.foreign import Wishes, understand, write
from build.sources.prove import prove
from build.sources.torchvision import TORCHVISION, write_torchvision

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found,unused-ignore]

if TYPE_CHECKING:
    from PIL import Image
    from rich.console import Console

_MOST_PICTURES = 64
_LOW_THRESHOLD = 0.05  # a score below which hardly anything is an object
# How label files call the background, case and underscores aside; "???" is TensorFlow's.
_BACKGROUND = ("background", "???")


def import_model(
    source: str,
    name: str = "",
    *,
    weights: str = "default",
    spec_file: Path | None = None,
    labels: Path | None = None,
    wishes: Wishes = Wishes(),  # noqa: B008
    settings: Sequence[str] = (),
    pictures: Path | None = None,
    force: bool = False,
    dry_run: bool = False,
    models: Path = MODELS,
    artifacts: Path = ARTIFACTS,
    console: Console | None = None,
) -> Path:
    """Makes models/<name>/ out of a torchvision model or an ONNX file.

    Args:
        source: ssd300_vgg16, ssdlite320_mobilenet_v3_large, or the path of an ONNX file.
        name: of the new model; default: the source's.
        weights: torchvision: `default` (downloaded by torchvision), `none` (random), or a file with a state dict.
        spec_file: ONNX: a spec.toml whose settings, labels and anchors (relative to it) are taken over.
        labels: a text file with one foreground label per line; for torchvision, of a state dict with other classes.
        wishes: ONNX: how the file is to be read, where it does not tell.
        settings: `table.key=value` with a TOML value, such as `nms.score_activation="sigmoid"`, for spec.toml.
        pictures: a folder of pictures for the proof; None = photographs that come with matplotlib.
        force: replace a model of this name.
        dry_run: show what was recognised, write nothing.
        models: where the folder goes.
        artifacts: where the drawing of the proof goes.
        console: where to print; None = standard output.

    Returns:
        The folder.

    Raises:
        SSDError: what is wrong and what to do; nothing was written then.
    """
    from rich.console import Console

    show = console or Console(highlight=False, soft_wrap=True)
    if source in TORCHVISION:
        if spec_file or wishes != Wishes():
            raise OptionError(f"{source} brings its own spec, anchors and heads", fix="leave those options out")
        own = None if labels is None else _lines(labels)
        return _write(
            models, name or source, settings, force, lambda folder: write_torchvision(folder, source, weights, own)
        )
    path = Path(source)
    if path.suffix != ".onnx":
        raise OptionError(
            f"source is {source!r}, but must be {', '.join(TORCHVISION)} or the path of an .onnx file",
            fix="spell it so, or export the model to ONNX first",
        )
    given = _given(spec_file)
    kept = given.pop("model", {})
    if spec_file is not None:
        labels = labels or spec_file.parent / str(kept.get("labels", "labels.txt"))
        anchors = spec_file.parent / str(kept.get("anchors", "anchors.npy"))
        wishes = (
            wishes if wishes.anchors or not anchors.is_file() else dataclasses.replace(wishes, anchors=str(anchors))
        )
    if labels is None:
        raise OptionError(
            "an ONNX file needs its labels", fix="name them: --labels labels.txt, one foreground label per line"
        )
    tables: dict[str, dict[str, Any]] = {table: dict(values) for table, values in given.items()}
    _apply(tables, settings)
    size = tables.get("input", {})
    wishes = dataclasses.replace(wishes, width=int(size.get("width", 0)), height=int(size.get("height", 0)))
    names = _lines(labels)
    # Files of pytorch-ssd, torchvision and TensorFlow begin with the background, which is not a label here.
    background = names[0] if names and names[0].strip(" _").lower() in _BACKGROUND else ""
    if background and "background_class" not in tables.get("nms", {}):
        names = names[1:]
    foreign = understand(path, names, wishes)
    if background:
        foreign.reading.fact("labels", f"{len(names)}, without {background!r}", f"line 1 of {labels} is the background")
    for table, values in tables.items():
        for key, value in values.items():
            foreign.reading.override(f"{table}.{key}", value, "--set" if spec_file is None else f"--set or {spec_file}")
    show.print(foreign.table())
    if dry_run:
        show.print("dry run: nothing was written", markup=False)
        return models / (name or path.stem)
    looked_at = _pictures(pictures)
    drawing = artifacts / "import" / f"{name or path.stem}.png"

    def fill(folder: Path) -> dict[str, dict[str, Any]]:
        (folder / "labels.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
        written = write(folder, foreign)
        for table, values in tables.items():
            written.setdefault(table, {}).update(values)
        return written

    def proof(folder: Path) -> None:
        imported = spec.load(folder)
        result = prove(foreign, imported, looked_at, drawing)
        about = {
            "source": path.name,
            "family": foreign.reading.family,
            "facts": foreign.reading.facts,
            "proof": result.as_dict(),
        }
        files.write_json(folder / files.IMPORT_FILE, about)
        show.print(str(result), markup=False)
        if drawing.is_file():
            show.print(f"both sides drawn: {files.relative(drawing)}", markup=False)
        if imported.nms.score_threshold < _LOW_THRESHOLD:
            show.print(
                f"the original's score threshold, {imported.nms.score_threshold:g}, keeps what is hardly an object: "
                "for people, raise [nms] score_threshold in spec.toml, or ask with --score-threshold 0.3",
                markup=False,
            )

    sources = {"model.onnx": str(path), "labels.txt": str(labels), "anchors.npy": wishes.anchors or str(path)}
    return _write(models, name or path.stem, (), force, fill, proof, sources)


def _given(spec_file: Path | None) -> dict[str, dict[str, Any]]:
    """The tables of a spec.toml that the user takes over."""
    if spec_file is None:
        return {}
    try:
        tables = tomllib.loads(spec_file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ImportModelError(f"{spec_file}: cannot be read: {error}", fix="give the path of a spec.toml") from None
    for table, values in tables.items():
        if not isinstance(values, dict):
            raise ImportModelError(f"{spec_file}: {table!r} stands outside its tables", fix="see docs/spec.md")
    return dict(tables)


def _pictures(folder: Path | None) -> list[Image.Image]:
    """The pictures of the proof.

    Raises:
        ImportModelError: the folder holds none that can be read.
    """
    from ssd_client.exceptions import ImageError
    from ssd_client.preprocess import SUFFIXES, load_image

    if folder is None:
        return datasets.photographs()
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise ImportModelError(f"{folder}: holds no pictures", fix=f"name a folder with some: {', '.join(SUFFIXES)}")
    try:
        return [load_image(path) for path in paths[:_MOST_PICTURES]]
    except ImageError as error:
        raise ImportModelError(str(error)) from None


def _write(
    models: Path,
    name: str,
    settings: Sequence[str],
    force: bool,
    fill: Callable[[Path], dict[str, dict[str, Any]]],
    proof: Callable[[Path], None] | None = None,
    sources: Mapping[str, str] | None = None,
) -> Path:
    """Fills a folder beside `models`, checks what is in it as the build would, and only then renames it into place.

    Errors name the user's `sources` and not the files that were made of them.
    """
    if not re.fullmatch("[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise OptionError(f"name is {name!r}, but must be of letters, digits, - and _", fix="give another one: --name")
    target = models / name
    if target.exists() and not force:
        raise ImportModelError(f"{target} exists already", fix="give another name, or replace it with --force")
    models.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".importing-", dir=models.parent))
    content = staging / name
    try:
        content.mkdir()
        tables = fill(content)
        _apply(tables, settings)
        tables.setdefault("model", {})["name"] = name
        (content / "spec.toml").write_text(_toml(name, tables), encoding="utf-8")
        checked = spec.load(content)
        self_check(attach(checked), checked)
        if proof is not None:
            proof(content)
        _put(content, target)
    except OSError as error:
        raise ImportModelError(f"{target} cannot be written: {error}", fix="check the disk and its rights") from error
    except SSDError as error:
        texts = [error.what, error.why, error.fix]
        for file, source in (sources or {}).items():
            texts = [text.replace(str(content / file), source) for text in texts]
        texts = [text.replace(str(content), str(target)) for text in texts]
        raise type(error)(texts[0], why=texts[1], fix=texts[2]) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def _put(new: Path, target: Path) -> None:
    """Renames a folder into place; one that is there already is left under the new one's old name, in one step."""
    if not target.exists():
        new.rename(target)
        return
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(here, os.fsencode(new), here, os.fsencode(target), exchange) == 0:
        return
    code = ctypes.get_errno()
    if code not in (errno.EINVAL, errno.ENOSYS):
        raise OSError(code, os.strerror(code), str(target))
    aside = new.with_name(".replaced")  # a file system that cannot exchange: two steps
    target.rename(aside)
    try:
        new.rename(target)
    except BaseException:
        aside.rename(target)
        raise


def _toml(name: str, tables: Mapping[str, Mapping[str, Any]]) -> str:
    """spec.toml of these tables; JSON's strings, numbers, booleans and lists are TOML's, too."""
    lines = [f"# How models/{name}/model.onnx is built and served. Every key is explained in docs/spec.md."]
    for table, values in tables.items():
        lines += ["", f"[{table}]", *(f"{key} = {json.dumps(value, allow_nan=False)}" for key, value in values.items())]
    return "\n".join(lines) + "\n"


def _apply(tables: dict[str, dict[str, Any]], settings: Sequence[str]) -> None:
    """`table.key=value` into the tables; spec.load says what is unknown or out of range."""
    for setting in settings:
        parts = re.fullmatch(r"\s*(\w+)\.(\w+)\s*=(.*)", setting, re.S)
        if not parts:
            raise OptionError(f"setting {setting!r} is not of the form table.key=value")
        try:
            value = tomllib.loads(f"value ={parts[3]}")["value"]
        except (tomllib.TOMLDecodeError, KeyError):
            raise OptionError(
                f"setting {setting!r} has no TOML value", fix='quote a text: nms.score_activation="sigmoid"'
            ) from None
        tables.setdefault(parts[1], {})[parts[2]] = value


def _lines(path: Path) -> list[str]:
    """The labels; a byte order mark and blank lines at the end do not count."""
    try:
        text = path.read_text(encoding="utf-8-sig").rstrip()
    except (OSError, UnicodeDecodeError) as error:
        raise ImportModelError(f"{path}: cannot be read: {error}", fix="one foreground label per line, UTF-8") from None
    return text.split("\n") if text else []  # splitlines() would part a label at characters that spec.load refuses
