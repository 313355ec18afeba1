"""Holds the direction of imports among folders, and among rooms within: docs/architecture.md draws the rules."""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.diagrams import Graph, circles, drawn, reached, reduced

ROOT = Path(__file__).parents[1]
DIAGRAMS = drawn((ROOT / "docs" / "architecture.md").read_text())
"""By the folder whose rooms they show; `folders` has the top-level ones."""
FILES = sorted(path for folder in DIAGRAMS["folders"] for path in (ROOT / folder).rglob("*.py"))


parsed = functools.cache(ast.parse)


def imports(code: str, package: str) -> Iterator[tuple[str, bool]]:
    """Every module that `code`, a module of `package`, imports, and whether it does when it is imported itself."""
    waiting: list[tuple[ast.AST, bool]] = [(parsed(code), True)]
    while waiting:
        node, at_import = waiting.pop()
        if isinstance(node, ast.Import):
            yield from ((alias.name, at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            yield ".".join([*parents, *filter(None, [node.module])]), at_import
        at_import &= not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        waiting += [(child, at_import) for child in ast.iter_child_nodes(node)]


def crossings(name: str, path: str) -> Iterator[tuple[str, str, str]]:
    """Where the module at `path` (relative to the repository) leaves a room by importing `name`: diagram, room, other.

    Files that are in no room belong to all of them.
    """
    at, wanted = f"{path.removesuffix('.py')}/", f"{name.replace('.', '/')}/"
    for diagram, graph in DIAGRAMS.items():
        folder = "" if diagram == "folders" else f"{diagram}/"
        if at.startswith(folder) and wanted.startswith(folder):
            mine, its = (where.removeprefix(folder).split("/")[0] for where in (at, wanted))
            if mine != its and its in graph:
                yield diagram, mine, its


def broken_rules(code: str, path: str) -> list[str]:
    """What the module at `path` (relative to the repository) imports but must not."""
    broken = []
    for name, at_import in imports(code, path.rpartition("/")[0].replace("/", ".")):
        for diagram, mine, its in crossings(name, path):
            graph = DIAGRAMS[diagram]
            if mine not in graph:
                broken.append(f"{path}, which is in no room of {diagram}, imports {name}")
            elif its not in reached(graph, mine):
                broken.append(f"{diagram}: {mine} imports {name}")
        top = name.split(".")[0]
        if top == "tests":
            broken.append(f"{path} imports {name}")
        if top == "deepspeed" and not path.startswith("train/engine"):
            broken.append(f"{path} imports {name}: only train/engine may")
        if top == "wandb" and at_import:
            broken.append(f"{path} imports wandb when it is imported itself")
    return broken


def rooms_graph(diagram: str) -> Graph:
    """What the rooms of a diagram import of each other."""
    graph: Graph = {room: set() for room in DIAGRAMS[diagram]}
    for path in FILES:
        relative = path.relative_to(ROOT).as_posix()
        for name, _ in imports(path.read_text(), relative.rpartition("/")[0].replace("/", ".")):
            for where, mine, its in crossings(name, relative):
                if where == diagram and mine in graph:
                    graph[mine].add(its)
    return graph


def import_graph() -> dict[str, set[str]]:
    """What each module of ours imports, now or later."""
    modules = {}
    for path in FILES:
        relative = path.relative_to(ROOT).with_suffix("")
        modules[".".join(relative.parts).removesuffix(".__init__")] = path
    graph = {}
    for name, path in modules.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        tree = parsed(path.read_text())
        names = {found for found, _ in imports(path.read_text(), package)}
        names |= {
            f"{node.module}.{a.name}" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for a in node.names
        }
        graph[name] = (names & modules.keys()) - {name}
    return graph


def test_no_import_circles() -> None:
    assert circles(import_graph()) == []


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == ["b", "c"]


def test_every_room_is_drawn() -> None:
    assert DIAGRAMS.keys() >= {"folders", "kernels", "offload", "train", "train/data", "launch"}
    for folder in DIAGRAMS.keys() - {"folders"}:
        rooms = {path.parent.name for path in (ROOT / folder).glob("*/__init__.py")}
        if folder != "kernels":  # its files are tools of all operations
            rooms |= {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__"}
        assert rooms == DIAGRAMS[folder].keys(), folder


def test_imports_point_one_way() -> None:
    broken = {path: broken_rules(path.read_text(), path.relative_to(ROOT).as_posix()) for path in FILES}
    assert {path: rules for path, rules in broken.items() if rules} == {}


@pytest.mark.parametrize("name", DIAGRAMS)
def test_a_diagram_has_the_arrows_that_are_imported_and_no_other(name: str) -> None:
    graph = rooms_graph(name)
    assert circles(graph) == []
    assert DIAGRAMS[name] == reduced(graph), "draw:\n" + "\n".join(
        f"    {room}{' --> ' * bool(ends)}{' & '.join(sorted(ends))}" for room, ends in reduced(graph).items()
    )


def names_of_auto_ep(code: str) -> list[str]:
    """Names in `code` that only the adapter to AutoEP should know."""
    return re.findall(r"AutoEP|auto_ep_layer|\.router\b|[\"']router\b|experts\.w\d|[\"']w[123][\"']", code)


def test_one_file_knows_auto_ep() -> None:
    adapter = ROOT / "train/engine/auto_ep.py"
    assert len(set(names_of_auto_ep(adapter.read_text()))) >= 5
    assert [path for path in FILES if names_of_auto_ep(path.read_text())] == [adapter]


def test_all_folders_are_looked_at() -> None:
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert folders <= {path.relative_to(ROOT).parts[0] for path in FILES} == DIAGRAMS["folders"].keys()


@pytest.mark.parametrize(
    ("path", "code", "count"),
    [
        ("kernels/a.py", "import torch\nfrom . import b\nfrom kernels.c import d", 0),
        ("kernels/a.py", "from model.engram import x", 1),
        ("model/a.py", "import offload.tables as t", 1),
        ("model/a.py", "if TYPE_CHECKING:\n    from offload import tables", 1),
        ("offload/a.py", "def f():\n    import train.config", 1),
        ("offload/a/b.py", "from .. import c\nfrom ..d import e", 0),
        ("train/a.py", "import launch, model", 1),
        ("train/data/a.py", "from deepspeed.utils import x", 1),
        ("train/engine/a.py", "import deepspeed", 0),
        ("train/a.py", "import wandb", 1),
        ("train/a.py", "class A:\n    import wandb", 1),
        ("train/a.py", "def f():\n    import wandb", 0),
        ("offload/rows/a.py", "from offload.plan.sharding import Sharding", 0),
        ("offload/plan/a.py", "def f():\n    from offload.rows.records import x", 1),
        ("offload/window/a.py", "from offload.tables import EngramTables", 1),
        ("train/config/a.py", "from train.report.metrics import x", 1),
        ("train/data/stores/a.py", "from train.data.remote.files import x", 0),
        ("train/data/stores/a.py", "from train.data.batches.loader import x", 1),
        ("kernels/rows/a.py", "import kernels.records, kernels.ieee", 1),
        ("launch/a.py", "from tests.distributed import run_ranks", 1),
    ],
)
def test_the_rules_catch_what_they_should(path: str, code: str, count: int) -> None:
    assert len(broken_rules(code, path)) == count
