"""`./invoke` in odd folders, from other folders and with odd arguments: the wrapper, and the commands of the tasks."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from invoke.context import Context
from invoke.exceptions import Exit

ROOT = Path(__file__).resolve().parent.parent
ODD_NAMES = ("mein projekt ü", "it's", 'a "b" $HOME `c` \\d', "  -n")

IMPORTER = "build.sources.import_model"


def load_tasks(monkeypatch: pytest.MonkeyPatch, caller: Path) -> ModuleType:
    """tasks/ as the wrapper runs it for somebody in the folder `caller`."""
    monkeypatch.setenv("SSD_CALLER_DIR", str(caller))
    for name in [name for name in sys.modules if name.split(".")[0] == "tasks"]:
        monkeypatch.delitem(sys.modules, name)
    return importlib.import_module("tasks")


@dataclass
class Recorder(Context):
    """A context that runs nothing and keeps the command lines, as their shell would split them."""

    status: int = 0
    commands: list[list[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        Context.__init__(self)

    def __setattr__(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def run(self, command: str, **_: object) -> object:
        self.commands.append(shlex.split(command))
        return type("Result", (), {"exited": self.status})()


# -- the tasks' command lines ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("port", ["99999", "-1", "web"])
def test_a_wrong_port_is_told_before_a_server_starts(
    port: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tasks = load_tasks(monkeypatch, tmp_path)
    monkeypatch.setattr("build.page.server_at", None)
    monkeypatch.setattr("build.serve.subprocess", None)
    with pytest.raises(Exit, match=f"--port is '{port}'"):
        tasks.serving.page(Recorder(), port=port)
    with pytest.raises(Exit, match=f"--metrics-port is '{port}'"):
        tasks.serving.serve(Recorder(), metrics_port=port)


@pytest.mark.parametrize("name", ODD_NAMES)
def test_tasks_quote_the_interpreter(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = str(tmp_path / name / ".venv/bin/python")
    monkeypatch.setattr(sys, "executable", python)
    tasks = load_tasks(monkeypatch, tmp_path)
    monkeypatch.setattr(tasks.common.importlib.util, "find_spec", lambda _: None)  # so that groups are installed, too
    context = Recorder()
    for run in (tasks.project.test, tasks.project.lint, tasks.building.train):
        run.body(context)
    assert len(context.commands) == 7
    assert {command[0] for command in context.commands} == {python}
    assert {command[1] for command in context.commands} == {"-m"}


def test_test_quotes_its_options_and_shows_the_slowest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = Recorder()
    load_tasks(monkeypatch, tmp_path).project.test.body(context, keyword="it's or that", marker="not slow")
    command = context.commands[0]
    assert command[command.index("-k") + 1] == "it's or that"
    assert command[command.index("-m", 3) + 1] == "not slow"
    assert "--durations=30" in command
    assert command[-1] == "tests"


def test_failed_tests_keep_their_exit_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Exit) as left:
        load_tasks(monkeypatch, tmp_path).project.test.body(Recorder(status=5))
    assert left.value.code == 5


# -- the caller's folder -----------------------------------------------------------------------------------------------


def test_test_path_is_the_callers_or_else_the_projects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "it's" / "test_mine.py"
    mine.parent.mkdir()
    mine.touch()
    tasks = load_tasks(monkeypatch, mine.parent)
    for given, expected in {
        "test_mine.py": str(mine),
        "test_mine.py::test_it": f"{mine}::test_it",
        str(mine): str(mine),
        "tests/test_tree.py": "tests/test_tree.py",
        "": "tests",
    }.items():
        context = Recorder()
        tasks.project.test.body(context, path=given)
        assert context.commands[0][-1] == expected


def test_tests_of_the_caller_are_not_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tests").mkdir()
    context = Recorder()
    load_tasks(monkeypatch, tmp_path).project.test.body(context)
    assert context.commands[0][-1] == "tests"


def test_paths_are_relative_to_the_caller_and_names_stay_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    tasks = load_tasks(monkeypatch, tmp_path)
    assert tasks.common.path_of("") is None
    assert tasks.common.path_of("labels.txt") == tmp_path / "labels.txt"
    assert tasks.common.path_of("/labels.txt") == Path("/labels.txt")
    assert tasks.common.given_or_name("") == ""
    assert tasks.common.given_or_name("run") == str(tmp_path / "run")
    assert tasks.common.given_or_name("2026-01-31T12-00-00") == "2026-01-31T12-00-00"
    assert tasks.common.given_or_name("https://example.com/a.git") == "https://example.com/a.git"
    assert "SSD_CALLER_DIR" not in os.environ, "what the tasks start must not inherit it"


@pytest.mark.parametrize("name", ["ssd300_vgg16", "ssdlite320_mobilenet_v3_large", "mistyped-name"])
def test_names_of_sources_and_weights_stay_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = recorded_import(monkeypatch, tmp_path, source=name, weights="none", labels="labels.txt")
    assert given["source"] == name
    assert given["weights"] == "none"
    assert given["labels"] == tmp_path / "labels.txt"


def test_files_to_import_are_the_callers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/anchors.npy").touch()
    given = recorded_import(
        monkeypatch,
        tmp_path,
        source="model.onnx",
        weights="weights.pth",
        spec="spec.toml",
        labels="labels.txt",
        anchors="sub/anchors.npy",
    )
    assert given["source"] == str(tmp_path / "model.onnx")
    assert given["weights"] == str(tmp_path / "weights.pth")
    assert given["spec_file"] == tmp_path / "spec.toml"
    assert given["labels"] == tmp_path / "labels.txt"
    assert given["wishes"].anchors == str(tmp_path / "sub/anchors.npy")
    assert capsys.readouterr().out == "models/mine/ is ready; next: ./invoke build-engines --model mine\n"


def recorded_import(monkeypatch: pytest.MonkeyPatch, caller: Path, source: str, **options: str) -> dict[str, Any]:
    """What the task import-model gives to the function that imports."""
    given: dict[str, Any] = {}

    def import_model(source: str, name: str, **rest: object) -> Path:
        given.update(rest, source=source, name=name)
        return ROOT / "models" / "mine"

    monkeypatch.setattr(f"{IMPORTER}.import_model", import_model)
    load_tasks(monkeypatch, caller).building.import_model.body(Recorder(), [], source, **options)
    return given


# -- the wrapper -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=ODD_NAMES)
def checkout(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkout in an odd folder, whose .venv is this interpreter's and is up to date."""
    root = tmp_path / request.param
    make_checkout(root)
    return root


def make_checkout(root: Path) -> None:
    """A checkout whose .venv is this interpreter's and is up to date."""
    (root / ".venv/bin").mkdir(parents=True)
    shutil.copy(ROOT / "invoke", root)
    shutil.copytree(ROOT / "tasks", root / "tasks", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "requirements", root / "requirements")
    python = root / ".venv/bin/python"
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    locks = (root / f"requirements/{name}.lock" for name in ("runtime", "tritonserver", "perf_analyzer"))
    server = " with the tritonserver on PATH" if shutil.which("tritonserver") else ""
    content = b"".join(lock.read_bytes() for lock in locks) + f"{root}{server}\n".encode()
    stamp = subprocess.run(["sha256sum"], input=content, stdout=subprocess.PIPE, check=True).stdout.split()[0]
    (root / ".venv/.stamp").write_bytes(stamp + b"\n")


def test_wrapper_runs_a_task_in_an_odd_folder_for_a_caller_elsewhere(checkout: Path, tmp_path: Path) -> None:
    caller = tmp_path / "caller's ü"
    caller.mkdir()
    (tmp_path / "link").symlink_to(checkout / "invoke")
    with (checkout / "tasks" / "building.py").open("a") as file:
        file.write("\n\n@task\ndef where(c: Context, path: str) -> None:\n    c.run('pwd')\n    print(path_of(path))\n")
    for command in (checkout / "invoke", Path(os.path.relpath(checkout / "invoke", caller)), tmp_path / "link"):
        done = subprocess.run(
            [command, "where", "--path", "x.onnx"], cwd=caller, capture_output=True, text=True, check=False
        )
        assert done.stderr == ""
        assert done.stdout.splitlines() == [str(checkout), str(caller / "x.onnx")]


def test_a_word_for_a_number_is_an_error_in_words(checkout: Path) -> None:
    command = [checkout / "invoke", "page", "--workers", "many"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "--workers is 'many'\nwhat to do: give a whole number\n"


@pytest.mark.parametrize("package", ["invoke", "interrupted"])
def test_ctrl_c_is_no_traceback(package: str, tmp_path: Path) -> None:
    """While Invoke is imported, and while NumPy is, which makes an ImportError of it."""
    root = tmp_path / "checkout"
    make_checkout(root)
    with (root / "tasks" / "building.py").open("a") as file:
        file.write("\n\n@task\n@explained\ndef load(c: Context) -> None:\n    import interrupted\n")
    (root / "build").mkdir()
    for module in ("__init__", "errors"):
        shutil.copy(ROOT / "build" / f"{module}.py", root / "build")
    stop = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"
    if package == "interrupted":
        stop = "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept KeyboardInterrupt:\n"
        stop += "    raise ImportError\n"
    (root / f"{package}.py").write_text(stop)
    done = subprocess.run(
        [root / "invoke", "load"],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # it may be ignored here
    )
    status, text = (-signal.SIGINT, "") if package == "invoke" else (130, "interrupted\n")
    assert (done.returncode, done.stderr) == (status, text)


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        (["a.onnx", "--labels", "b.txt"], ["--source", "a.onnx", "--labels", "b.txt"]),
        (["--labels", "b.txt", "--force", "a b.onnx"], ["--labels", "b.txt", "--force", "--source", "a b.onnx"]),
        (["--set", "nms.x='y z'", "--labels=b.txt", "it's.onnx"],
         ["--set", "nms.x='y z'", "--labels=b.txt", "--source", "it's.onnx"]),
        (["--family", "list"], ["--family", "list"]),
        (["--from", "faces", "--dry-run"], ["--from", "faces", "--dry-run"]),
        ([], []),
    ],
)  # fmt: skip
def test_wrapper_names_the_source_of_an_import(tmp_path: Path, given: list[str], passed: list[str]) -> None:
    """Invoke has no positional argument that may be left out."""
    root = tmp_path / "checkout"
    make_checkout(root)
    (root / ".venv/bin/python").write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    done = subprocess.run([root / "invoke", "import-model", *given], capture_output=True, text=True, check=True)
    assert done.stdout.split("program.run()\n")[1].splitlines() == ["import-model", *passed]


def test_the_wrapper_knows_the_flags_of_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The options that take no value, beside those that every task has."""
    task = load_tasks(monkeypatch, tmp_path).building.import_model
    flags = {name for argument in task.get_arguments() if argument.kind is bool for name in argument.names if name[1:]}
    (line,) = (line for line in (ROOT / "invoke").read_text().splitlines() if "| --help |" in line)
    assert {part.strip() for part in line.split(")")[0].split("|")} == {
        *(f"--{name.replace('_', '-')}" for name in flags), "--help", "-*=*",
    }  # fmt: skip


def test_wrapper_refuses_a_folder_that_no_environment_can_be_in(tmp_path: Path) -> None:
    root = tmp_path / "a:b"
    root.mkdir()
    shutil.copy(ROOT / "invoke", root)
    shutil.copytree(ROOT / "requirements", root / "requirements")
    done = subprocess.run([root / "invoke", "--list"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "has a colon in its name" in done.stderr
    assert "what to do: rename the folder" in done.stderr
    assert not (root / ".venv").exists()


# -- without a package index, and in NVIDIA's container ----------------------------------------------------------------


def program(path: Path, text: str) -> Path:
    """A script for sh."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def container(tmp_path: Path) -> Path:
    """A checkout without .venv, and programs that record what is asked of a Python: ensurepip and pip are stand-ins."""
    root = tmp_path / "checkout"
    root.mkdir()
    shutil.copy(ROOT / "invoke", root)
    shutil.copytree(ROOT / "requirements", root / "requirements")
    installs = f'echo "$*" >>{shlex.quote(str(tmp_path / "asked"))}'
    # What an environment's python does: pip installs nothing.
    other = f'*) exec {shlex.quote(sys.executable)} "$@" ;;'
    # It must not be the real one for anything else: the wrapper writes into the packages of what it made.
    made = f"case $* in '-m pip'*) {installs} ;; *'program.run()'*) echo ran ;; esac"
    program(tmp_path / "made-python", made)
    copy = f'mkdir -p "$4/bin" && cp {shlex.quote(str(tmp_path / "made-python"))} "$4/bin/python"'
    program(
        tmp_path / "bin" / "python3.12",
        "case $* in\n'-c import ensurepip, venv') exit 1 ;;\n'-c import virtualenv') exit 0 ;;\n"
        f"'-m virtualenv'*) shift 2; set -- x \"$@\"; {installs}; {copy} ;;\n"
        f"{other}\nesac",
    )
    return tmp_path


def start(container: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs the wrapper with the stand-ins first on PATH."""
    environment = {**os.environ, "PATH": f"{container / 'bin'}:{os.environ['PATH']}", **variables}
    command = [container / "checkout" / "invoke", *arguments]
    return subprocess.run(command, env=environment, cwd=container, capture_output=True, text=True, check=False)


def test_without_ensurepip_virtualenv_makes_the_environment(container: Path) -> None:
    done = start(container, "--list")
    assert (done.returncode, done.stdout) == (0, "ran\n"), done.stderr
    asked = (container / "asked").read_text()
    assert asked.startswith("x --quiet --no-download ")
    assert "requirements/tritonserver.lock" in asked


def test_the_wheels_server_is_left_out_where_one_is_on_path(container: Path) -> None:
    program(container / "bin" / "tritonserver", "")
    assert start(container, "--list").stdout == "ran\n"
    asked = (container / "asked").read_text()
    assert "requirements/perf_analyzer.lock" in asked
    assert "requirements/tritonserver.lock" not in asked
    (container / "bin" / "tritonserver").unlink()
    assert start(container, "--list").stdout == "ran\n"  # made again, now with the wheel's
    assert "requirements/tritonserver.lock" in (container / "asked").read_text()


def test_with_neither_it_says_both_ways(container: Path) -> None:
    program(
        container / "bin" / "python3.12",
        "case $* in '-c import ensurepip, venv' | '-c import virtualenv') exit 1 ;;\n"
        f'*) exec {shlex.quote(sys.executable)} "$@" ;; esac',
    )
    for tool in ("sh", "dirname", "readlink", "cat", "sha256sum", "cut", "uname", "rm"):
        path = shutil.which(tool)
        assert path
        (container / "bin" / tool).symlink_to(path)
    done = start(container, "--list", PATH=str(container / "bin"))
    assert done.returncode == 1
    assert "apt-get install python3-venv, or pip install virtualenv" in done.stderr
    assert not (container / "checkout" / ".venv").exists()


@pytest.mark.parametrize("how", [["--site", "my site"], ["--site=my site"], ["--force", "--site", "my site"]])
def test_gpu_check_runs_from_a_folder_of_packages_without_an_environment(container: Path, how: list[str]) -> None:
    package = container / "my site" / "invoke"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text("import sys\nprint(sys.path[1], sys.argv[1:])\n")
    (container / "my site" / "rich.py").touch()
    (container / "my site").chmod(0o555)
    done = start(container, "gpu-check", *how)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{container / 'my site'} {['gpu-check', *how]}\n"
    assert not (container / "checkout" / ".venv").exists()
    assert not list(container.glob("my site/**/__pycache__"))


def test_a_folder_of_another_python_is_named(container: Path) -> None:
    (container / "empty").mkdir()
    program(
        container / "bin" / "python3.12",
        f"case $* in '-c import invoke, rich') exit 1 ;; *) exec {shlex.quote(sys.executable)} \"$@\" ;; esac",
    )
    done = start(container, "gpu-check", "--site", "empty")
    assert done.returncode == 1
    assert f"finds no packages invoke and rich in {container / 'empty'}" in done.stderr


def test_other_tasks_do_not_take_site(container: Path) -> None:
    assert start(container, "test", "--path", "--site").stdout == "ran\n"


def test_a_terminal_without_a_character_does_not_end_a_task() -> None:
    code = "import tasks; print('\\u2713')"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "\\u2713\n"), done.stderr
