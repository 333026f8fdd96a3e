"""Who imports whom in build/: arrows go down, nowhere in a circle, and never to another file's underscore names."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from build.files import ROOT

# From the bottom to the top: the foundations, the rooms, and what ties them together.
FOUNDATIONS = ("contract", "errors", "files", "optional", "releases", "session", "spec", "tables")
ROOMS = ("graph", "tensorrt", "gate", "quantization", "publish", "reports", "sources")
OF_THE_CLIENT = {f"ssd_client.{name}" for name in ("exceptions", "ports", "preprocess", "rule", "text")}
OF_ITS_TRANSPORT = {"ssd_client.messages", "ssd_client.transport"}  # a server is asked for as the gateway will ask it
FILES = sorted(path for path in (ROOT / "build").rglob("*.py") if "backends" not in path.parts)


def name_of(path: Path) -> str:
    """The dotted name of a module."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): ast.parse(path.read_text()) for path in FILES}


def imports(tree: ast.Module) -> Iterator[tuple[str, str, str]]:
    """(module, name taken from it, name here) of every import, those inside functions and for types included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "imports in build/ are absolute"
            yield from ((node.module, alias.name, alias.asname or alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "", alias.asname or alias.name.split(".")[0]) for alias in node.names)


def arrows(modules: dict[str, ast.Module]) -> dict[str, set[str]]:
    """Module → the modules of build/ that it imports."""
    found: dict[str, set[str]] = {name: set() for name in modules}
    for name, tree in modules.items():
        for module, taken, _ in imports(tree):
            target = f"{module}.{taken}" if f"{module}.{taken}" in modules else module
            if target in modules and target != name:
                found[name].add(target)
    return found


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle; empty where there is none."""
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        for other in sorted(graph[name]):
            if found := visit(other, [*way, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := visit(name, []))), [])


def floor(name: str) -> int:
    """The height of a module: foundations, rooms in their order, the files on top."""
    first = name.split(".")[1]
    if first in FOUNDATIONS:
        return 0
    return 1 + ROOMS.index(first) if first in ROOMS else 1 + len(ROOMS)


def upwards(graph: dict[str, set[str]]) -> list[str]:
    """The arrows that go up."""
    return [f"{name} -> {other}" for name in graph for other in graph[name] if floor(other) > floor(name)]


def private(modules: dict[str, ast.Module]) -> list[str]:
    """Underscore names that a file takes from another one."""
    found = []
    for name, tree in modules.items():
        ours = {here for module, _, here in imports(tree) if module.split(".")[0] in ("build", "ssd_client")}
        found += [f"{name}: {module}.{taken}" for module, taken, _ in imports(tree) if _is_private(taken)]
        found += [
            f"{name}: {node.value.id}.{node.attr}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
            if node.value.id in ours and _is_private(node.attr)
        ]
    return found


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def test_every_folder_has_its_floor() -> None:
    folders = {path.parent.name for path in (ROOT / "build").glob("*/__init__.py")}
    assert folders == set(ROOMS)
    assert {f"build.{name}" for name in FOUNDATIONS} <= set(MODULES)


def test_no_circles() -> None:
    assert not circle(arrows(MODULES))


def test_no_arrow_goes_up() -> None:
    assert not upwards(arrows(MODULES))


def test_no_underscore_name_of_another_file() -> None:
    assert not private(MODULES)


def test_of_the_client_only_pictures_ports_and_words() -> None:
    for name, tree in MODULES.items():
        taken = {module for module, _, _ in imports(tree) if module.split(".")[0] == "ssd_client"}
        assert taken <= OF_THE_CLIENT | (OF_ITS_TRANSPORT if name == "build.page" else set()), name


@pytest.mark.parametrize(
    ("sources", "check", "complaint"),
    [
        ({"build.graph.a": "def f():\n    from build.spec import x", "build.spec": "from build.graph import a"}, circle,
         "build.graph.a build.spec build.graph.a"),
        ({"build.gate.a": "if TYPE_CHECKING:\n    from build.publish.b import B", "build.publish.b": ""}, upwards,
         "build.gate.a -> build.publish.b"),
        ({"build.spec": "import build.pipeline", "build.pipeline": ""}, upwards, "build.spec -> build.pipeline"),
    ],
)  # fmt: skip
def test_what_breaks_a_rule_is_noticed(sources: dict[str, str], check: object, complaint: str) -> None:
    modules = {name: ast.parse(source) for name, source in sources.items()}
    assert callable(check)
    assert " ".join(check(arrows(modules))) == complaint


def test_underscore_names_are_noticed() -> None:
    source = "from build.publish import repository\nfrom build.gate.verify import _pair\nx = repository._damage(1)"
    assert private({"build.doctor": ast.parse(source)}) == [
        "build.doctor: build.gate.verify._pair",
        "build.doctor: repository._damage",
    ]
