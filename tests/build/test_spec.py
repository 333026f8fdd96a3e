"""spec.toml: what is right is read, everything else is one error that names file, table, key, value and range."""

from __future__ import annotations

import dataclasses
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest

from build import contract
from build import spec as spec_module
from build.errors import SpecError
from build.files import ROOT
from build.spec import Nms, Profile, Serving, TensorRT, edit, load
from tests.build import tiny_model


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tiny_model.write(tmp_path / "tiny")


def test_a_whole_spec(path: Path) -> None:
    spec = load(path)
    assert spec == load(path.parent)
    assert spec.labels == ("cat", "dog")
    assert (spec.input.width, spec.input.mean, spec.nms.runtime_thresholds) == (8, (100.0, 110.0, 120.0), True)
    assert spec.nms.box_scales == (10.0, 10.0, 5.0, 5.0)  # a default
    assert spec.classes == 3
    assert (spec.onnx_path, spec.labels_path) == (path.parent / "model.onnx", path.parent / "labels.txt")
    anchors = spec.load_anchors()
    assert (anchors.shape, anchors.dtype) == ((8, 4), np.float32)
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.nms.max_detections = 7  # type: ignore[misc]


def test_a_byte_order_mark_is_no_content(path: Path) -> None:
    """As Windows editors write it, at the start of both files; and with their line ends."""
    wanted = load(path)
    for file in (path, path.parent / "labels.txt"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    assert load(path) == wanted
    edit(path, {"nms.iou_threshold": 0.4})
    assert load(path).nms.iou_threshold == 0.4


def test_the_models_here_have_valid_specs() -> None:
    found = sorted(ROOT.glob("models/*/spec.toml"))
    assert found
    for path in found:
        assert load(path).model.name == path.parent.name


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "[nms]",
            "[nms]\nscore_treshold = 0.5",
            r"\[nms\] score_treshold is an unknown key.*did you mean score_threshold",
        ),
        ("[nms]", "[nsm]", r"a table \[nsm\].*did you mean \[nms\]"),
        ("[model]", 'title = "x"\n[model]', "a key 'title' outside its tables"),
        ("width = 8", "", r"\[input\] width is missing"),
        ("width = 8", "width = 8.5", r"\[input\] width is 8.5, but must be a whole number"),
        ("width = 8", "width = true", r"\[input\] width is True, but must be a whole number"),
        ("width = 8", "width = 0", r"\[input\] width is 0, but must be in 1\.\.8192"),
        ("score_threshold = 0.1", "score_threshold = 1.5", r"\[nms\] score_threshold is 1.5, but must be in 0\.\.1"),
        ("score_threshold = 0.1", "score_threshold = nan", r"\[nms\] score_threshold is nan"),
        ("score_threshold = 0.1", 'score_threshold = "0.1"', r"is '0.1', but must be a number"),
        ("score_threshold = 0.1", "score_threshold = -1", r"is -1, but must be in 0\.\.1"),
        ("max_detections = 5", "max_detections = 0", r"max_detections is 0, but must be in 1\.\."),
        ("max_detections = 5", "background_class = 3", r"background_class is 3, but must be in -1\.\.2.*has 2 labels"),
        (
            "max_detections = 5",
            'score_activation = "softmx"',
            "must be one of softmax, sigmoid, none .did you mean 'softmax'",
        ),
        ("max_detections = 5", "box_scales = [10, 10, 5]", r"is \[10, 10, 5\], but must be a list of 4 numbers"),
        ("max_detections = 5", "box_scales = [10, 10, 5, 0]", "must be greater than 0"),
        ("max_detections = 5", "clip_boxes = 1", "clip_boxes is 1, but must be true or false"),
        ('"RGB"', '"GBR"', r"color_order is 'GBR', but must be one of RGB, BGR"),
        ("std = [50.0, 60.0, 70.0]", "std = [50.0, 0.0, 70.0]", "must be greater than 0"),
        ("std = [50.0, 60.0, 70.0]", "std = [50.0, 60.0, inf]", "std is .*inf"),
        ('name = "tiny"', 'name = "../tiny"', "name is '../tiny', but must match"),
        ('name = "tiny"', 'name = "tiny"\nonnx = "gone.onnx"', r"\[model\] onnx names .*gone.onnx, which is not there"),
        ('name = "tiny"', 'name = "tiny"\nanchors = "gone.npy"', r"\[model\] anchors names .*gone.npy"),
        (
            'name = "tiny"',
            'name = "tiny"\nlabels = "gone.txt"',
            r"\[model\] labels names .*gone.txt, which cannot be read",
        ),
        ("max_batch_size = 4", "max_batch_size = 0", r"max_batch_size is 0, but must be in 1\.\.4096"),
        ("[nms]", "[nms", "no valid TOML: .*line 12"),
        ("[nms]", "[input]", "no valid TOML"),
    ],
)
def test_what_is_wrong_is_named(path: Path, old: str, new: str, message: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(SpecError, match=f"(?s)^{path}: .*{message}"):
        load(path)


def test_a_spec_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="cannot be read: No such file"):
        load(tmp_path / "nothing")
    with pytest.raises(SpecError, match=r"spec\.toml: cannot be read: No such file"):
        load(tmp_path)
    (tmp_path / "spec.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(SpecError, match="no valid TOML"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no labels"),
        (b"cat\n\ndog\n", "line 2 is ''"),
        (b"cat\ncat\n", "line 2 repeats the label 'cat'"),
        (b"cat \ndog\n", "line 1 is 'cat '"),
        (b"\xff\n", "cannot be read"),
        (b"cat\nd\x1b[31mog\n", r"line 2 is 'd\\x1b\[31mog'(.|\n)*control characters"),
        ("cat\nd\u202eog\n".encode(), r"line 2 is 'd\\u202eog'"),
        ("cat\nd\u2028og\n".encode(), r"line 2 is 'd\\u2028og'"),  # splitlines() would make two labels of it
        (b"\xef\xbb\xbf\xef\xbb\xbfcat\ndog\n", r"line 1 is '\\ufeffcat'"),
    ],
)
def test_wrong_labels(path: Path, content: bytes, message: str) -> None:
    (path.parent / "labels.txt").write_bytes(content)
    with pytest.raises(SpecError, match=message):
        load(path)


def test_one_made_in_python_is_checked_too() -> None:
    assert Nms(score_threshold=1).score_threshold == 1.0
    with pytest.raises(ValueError, match="iou_threshold is 2"):
        Nms(iou_threshold=2)


@pytest.mark.parametrize("anchors", [np.zeros(4), np.ones((2, 5)), np.ones((2, 4), int), np.full((2, 4), np.nan), None])
def test_wrong_anchors(path: Path, anchors: np.ndarray | None) -> None:
    spec = load(path)
    if anchors is None:
        spec.anchors_path.write_bytes(spec.anchors_path.read_bytes()[:100])
    else:
        np.save(spec.anchors_path, anchors)
    with pytest.raises(SpecError, match=r"anchors\.npy"):
        spec.load_anchors()


def write_decoded(path: Path) -> None:
    path.write_text(path.read_text().replace("[nms]\n", '[nms]\nbox_coding = "decoded"\n'))


def test_decoded_boxes_need_no_anchors(path: Path) -> None:
    assert load(path).nms.needs_anchors
    write_decoded(path)
    with_file = load(path)  # a file that nothing names is not looked at
    with_file.anchors_path.unlink()
    spec = load(path)
    assert spec == with_file
    assert not spec.nms.needs_anchors
    with pytest.raises(SpecError, match=r'there are no anchors, as \[nms\] box_coding = "decoded"'):
        spec.load_anchors()


def test_the_node_of_decoded_boxes_has_corner_coding() -> None:
    plain = Nms(score_threshold=0.3, clip_boxes=False).attributes()
    decoded = Nms(score_threshold=0.3, clip_boxes=False, box_coding="decoded").attributes()
    assert list(decoded) == list(plain) == list(contract.ATTRIBUTES)
    assert decoded == {**plain, "box_coding": "corner", "box_scales": (1, 1, 1, 1)}
    assert contract.Nms(**{**decoded, **dict.fromkeys(("clip_boxes", "class_agnostic"), False)}).attributes() == decoded
    with pytest.raises(ValueError, match="box_coding is 'decoded', but must be one of center_size, corner"):
        contract.Nms(box_coding="decoded")


@pytest.mark.parametrize("scales", ["[1, 1, 1, 1]", "[10, 10, 5, 6]"])
def test_decoded_boxes_have_no_scales(path: Path, scales: str) -> None:
    write_decoded(path)
    path.write_text(path.read_text().replace("[nms]\n", f"[nms]\nbox_scales = {scales}\n"))
    with pytest.raises(SpecError, match=r"\[nms\] box_scales is .*, but must be left out: decoded boxes are not"):
        load(path)


@pytest.mark.parametrize("name", ["anchors.npy", "gone.npy"])
def test_decoded_boxes_with_anchors_are_refused(path: Path, name: str) -> None:
    write_decoded(path)
    path.write_text(path.read_text().replace("[model]\n", f'[model]\nanchors = "{name}"\n'))
    with pytest.raises(SpecError, match=rf"\[model\] anchors names .*{name}, but must be left out"):
        load(path)


@pytest.mark.parametrize(("name", "table"), spec_module._TABLES.items())
def test_the_page_explains_every_key(name: str, table: type) -> None:
    page = (ROOT / "docs" / "spec.md").read_text()
    section = page.split(f"## [{name}]")[1].split("\n## ")[0]
    rows = {line.split("|")[1].strip().strip("`"): line for line in section.splitlines() if line.startswith("| `")}
    assert list(rows) == [item.name for item in dataclasses.fields(table)]
    for item in dataclasses.fields(table):
        default = rows[item.name].split("|")[3].strip().strip("`")
        if item.default is dataclasses.MISSING:
            assert default == "required"
        else:
            value = item.default
            text = (
                str(value).lower()
                if isinstance(value, bool)
                else str(list(value) if isinstance(value, tuple) else value)
            )
            assert default == (text or '""'), item.name
        assert all(choice in rows[item.name] for choice in item.metadata["choices"]), item.name


PROFILE = "[[tensorrt.profiles]]\nmin = {}\nopt = {}\nmax = {}\n"


def test_profiles_default_to_one_over_all_batch_sizes(path: Path) -> None:
    spec = load(path)
    assert spec.profiles == (Profile(1, min(8, spec.serving.max_batch_size), spec.serving.max_batch_size),)


def test_several_profiles(path: Path) -> None:
    most = load(path).serving.max_batch_size
    path.write_text(path.read_text() + PROFILE.format(1, 1, 1) + PROFILE.format(2, 4, most))
    assert load(path).profiles == (Profile(1, 1, 1), Profile(2, 4, most))


@pytest.mark.parametrize(
    ("profiles", "complaint"),
    [
        ([(1, 5, 4)], "profiles 0: opt is 5"),
        ([(2, 4, 4)], "leave out batch size 1"),
        ([(1, 1, 1), (3, 4, 4)], "leave out batch size 2"),
        ([(1, 2, 3)], "leave out batch size 4"),
        ([(1, 4, 8)], "go up to 8"),
        ([(0, 4, 4)], "profiles 0: min is 0"),
        ([("1.5", 4, 4)], "profiles 0: min is 1.5"),
    ],
)
def test_wrong_profiles(path: Path, profiles: list[tuple[object, ...]], complaint: str) -> None:
    assert load(path).serving.max_batch_size == 4
    path.write_text(path.read_text() + "".join(PROFILE.format(*values) for values in profiles))
    with pytest.raises(SpecError, match=complaint):
        load(path)


def test_a_profile_without_opt_and_an_unknown_tactic_source() -> None:
    with pytest.raises(ValueError, match="must have min, opt, max"):
        TensorRT(profiles=[{"min": 1, "max": 2}])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"cublass.*did you mean 'cublas'"):
        TensorRT(tactic_sources=("cublass",))


# -- editing -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    folder = tmp_path / "shapes"
    shutil.copytree(ROOT / "models" / "shapes", folder, ignore=shutil.ignore_patterns("__pycache__"))
    return folder / "spec.toml"


def test_an_edit_keeps_every_other_byte_of_the_real_spec(shapes: Path) -> None:
    before = shapes.read_bytes()
    shapes.chmod(0o640)
    edit(shapes, {"serving.instances": 3, "serving.threads": 2})
    assert load(shapes).serving == Serving(max_batch_size=32, instances=3, threads=2)
    wanted = before.replace(b"\ninstances = 0 ", b"\ninstances = 3 ").replace(b"\nthreads = 0 ", b"\nthreads = 2 ")
    assert shapes.read_bytes() == wanted != before
    assert stat.S_IMODE(shapes.stat().st_mode) == 0o640
    edit(shapes, {"serving.instances": 0, "serving.threads": 0})
    assert shapes.read_bytes() == before
    assert [path.name for path in shapes.parent.iterdir() if ".new" in path.name] == []


def test_an_edit_adds_keys_that_are_not_there_yet(shapes: Path) -> None:
    before = shapes.read_text()
    edit(shapes, {"serving.instances": 4, "serving.dynamic_batching": "on", "serving.cuda_graphs": True})
    serving = load(shapes).serving
    assert (serving.instances, serving.dynamic_batching, serving.cuda_graphs) == (4, "on", True)
    added = [line for line in shapes.read_text().splitlines() if line not in before.splitlines()]
    assert len(added) == 3
    assert '\ndynamic_batching = "on"\ncuda_graphs = true\n\n[data]' in shapes.read_text()


EDITS = {
    "no table": ("[model]\nname = 'x'", "[model]\nname = 'x'\n\n[serving]\ninstances = 2\n"),
    "empty file": ("", "[serving]\ninstances = 2\n"),
    "empty table": ("[serving]  # here\n\n[data]\n", "[serving]  # here\ninstances = 2\n\n[data]\n"),
    "ends in it": ("[serving]", "[serving]\ninstances = 2\n"),
    "no last newline": ("[serving]\nthreads = 1", "[serving]\nthreads = 1\ninstances = 2\n"),
    "Windows": ("[serving]\r\ninstances=1 # a\r\n", "[serving]\r\ninstances=2 # a\r\n"),
    "Windows, no key": ("[serving]\r\na=1\r\n", "[serving]\r\na=1\r\ninstances = 2\r\n"),
    "both line ends": ("[serving]\r\na=1\n[data]\n", "[serving]\r\na=1\ninstances = 2\n[data]\n"),
    "a text": ('[serving]\ninstances = "auto"  # a\n', "[serving]\ninstances = 2  # a\n"),
    "quoted, indented": (' [ serving ]\n  "instances" = 1#a\n', ' [ serving ]\n  "instances" = 2#a\n'),
    "quoted table": ("[\"serving\"]\n'instances' = 1\n", "[\"serving\"]\n'instances' = 2\n"),
    "another table's key": ("[a]\ninstances = 1\n[serving]\n", "[a]\ninstances = 1\n[serving]\ninstances = 2\n"),
    "in a comment": ("[serving]\n# instances = 1\na = 0\n", "[serving]\n# instances = 1\na = 0\ninstances = 2\n"),
    "the next table's comment": (
        "[serving]\na = 0\n\n# of data\n[data]\n",
        "[serving]\na = 0\ninstances = 2\n\n# of data\n[data]\n",
    ),
    "inline table": ("serving = {a = 1, instances = 1}\n", "serving = {a = 1, instances = 2}\n"),
    "dotted keys": ("serving.instances = 1 # a\nserving.a = 1\n", "serving.instances = 2 # a\nserving.a = 1\n"),
    "other dotted keys": ("serving.a = 1\n[data]\n", "serving.a = 1\nserving.instances = 2\n[data]\n"),
    "in a text": ("a = '''\n[serving]\n'''\n", "a = '''\n[serving]\n'''\n\n[serving]\ninstances = 2\n"),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_of_other_ways_to_write_it(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spec_module, "load", lambda path: None)  # these are tables, not whole specs
    before, after = EDITS[name]
    file = tmp_path / "spec.toml"
    file.write_bytes(before.encode())
    edit(file, {"serving.instances": 2})
    assert file.read_bytes().decode() == after


@pytest.mark.parametrize("text", ["serving = 3\n", "[[serving]]\na = 1\n", "serving = [1, 2]\n", "a ="])
def test_a_spec_that_cannot_be_edited_is_left(tmp_path: Path, text: str) -> None:
    file = tmp_path / "spec.toml"
    file.write_text(text)
    with pytest.raises(SpecError, match=r"cannot be (changed|read)"):
        edit(file, {"serving.instances": 2})
    assert file.read_text() == text
    assert list(tmp_path.iterdir()) == [file]


def test_an_edit_that_the_spec_refuses(shapes: Path) -> None:
    before = shapes.read_bytes()
    with pytest.raises(SpecError, match=r"in 0\.\.1024"):
        edit(shapes, {"serving.instances": 5000})
    assert shapes.read_bytes() == before
    assert [path.name for path in shapes.parent.iterdir() if ".new" in path.name] == []


@pytest.mark.parametrize(
    "before",
    [
        "",
        "[quantization]\ngate = 0.9\n",
        '[quantization]\nexclude_nodes = ["old"]  # why\ngate = 0.9\n',
        "[quantization]\ngate = 0.9\nexclude_nodes = [\n    'old',  # [why]\n    \"other\"\n]\n"
        "\n[data]\ncalibration = 'x'\n",
    ],
)
@pytest.mark.parametrize("names", [("a/b", 'c"d'), ()])
def test_an_edit_of_a_list_leaves_the_rest(path: Path, before: str, names: tuple[str, ...]) -> None:
    path.write_text(f"# mine\n{path.read_text()}\n{before}")
    old = load(path)
    edit(path, {"quantization.exclude_nodes": names})
    new = load(path)
    assert new.quantization.exclude_nodes == names
    assert dataclasses.replace(new.quantization, exclude_nodes=()) == dataclasses.replace(
        old.quantization, exclude_nodes=()
    )
    assert (new.nms, new.data, new.input) == (old.nms, old.data, old.input)
    assert path.read_text().startswith("# mine\n")
    assert not list(path.parent.glob("*.new*"))


@pytest.mark.parametrize("generator", ["../gen.py", "sub/../../gen.py", "/tmp/gen.py", "link.py"])
def test_a_generator_outside_the_models_folder_is_refused(path: Path, generator: str) -> None:
    """A build would run it."""
    (path.parent.parent / "gen.py").write_text("raise SystemExit('it ran')")
    (path.parent / "link.py").symlink_to(path.parent.parent / "gen.py")
    path.write_text(path.read_text() + f'[data]\ngenerator = "{generator}"\nheld_out = "a"\n')
    with pytest.raises(SpecError, match=r"\[data\] generator is .*outside the model's folder"):
        load(path)
