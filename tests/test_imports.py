"""Holds the direction of imports: among folders (kernels <- model, offload <- train <- launch), and rooms within."""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {
    "kernels": set(),
    "model": {"kernels"},
    "offload": {"kernels"},
    "train": {"kernels", "model", "offload"},
    "launch": {"kernels", "model", "offload", "train"},
    "serve": set(),
}
_BASE = {"errors", "files", "machine", "progress", "run_folder"}
INNER = {
    "kernels": {
        "gather": set(),
        "hash": set(),
        "gate": set(),
        "branches": set(),
        "rows": set(),
        "deduplicate": {"gather"},
        "records": {"rows"},
    },
    "offload": {
        "optimizers": set(),
        "config": {"optimizers"},
        "addresses": set(),
        "host": set(),
        "device": set(),
        "plan": {"addresses", "device"},
        "rows": {"config", "host", "optimizers", "plan"},
        "transfers": {"config", "device", "host", "rows"},
        "window": {"config", "device", "host", "plan", "rows", "transfers"},
        "observer": {"host", "plan"},
        "gradients": {"plan"},
        "step": {"gradients", "observer", "device", "plan", "rows", "window"},
        "owned_rows": {"step", "plan", "rows"},
        "verify": {"host", "observer", "step", "addresses", "plan", "rows"},
        "opening": {"config", "observer", "step", "addresses", "device", "plan", "rows", "window", "verify"},
        "tables": {"config", "opening", "owned_rows", "step", "addresses", "device", "plan", "rows", "window"},
    },
    "train": {
        "errors": set(),
        "files": {"errors"},
        "machine": set(),
        "hardware": {"machine"},
        "memory": set(),
        "progress": set(),
        "run_folder": {"errors"},
        "run_state": {"errors", "files", "run_folder"},
        "spikes": set(),
        "look_ahead": set(),
        "history": {"files", "checkpoint", "report", "run_folder"},
        "watch": {"errors"},
        "optim": set(),
        "data": _BASE,
        "config": {"errors", "files", "data", "optim"},
        "engine": {"config", "optim"},
        "tables": {"errors", "config", "data"},
        "huggingface": {"errors"},
        "evaluation": {"data"},
        "checkpoint": {*_BASE, "config", "optim", "engine", "huggingface"},
        "report": {*_BASE, "config", "data", "evaluation", "look_ahead", "memory", "optim", "run_state"},
        "page": {*_BASE, "config", "report", "status", "use"},
        "status": {*_BASE, "checkpoint", "report", "run_state", "watch"},
        "use": {*_BASE, "config", "data", "engine", "tables", "evaluation", "checkpoint", "huggingface", "report"},
        "validation": {"data", "engine", "evaluation", "watch"},
        "refusals": {"config", "data", "errors", "report", "spikes"},
        "saving": {"config", "errors", "checkpoint", "report", "watch"},
        "trainer": {
            *_BASE,
            *("config", "data", "engine", "evaluation", "optim", "checkpoint", "report"),
            *("look_ahead", "saving", "refusals", "validation", "watch"),
        },
        "build": {"errors", "config", "data", "engine", "evaluation"},
        "origin": {"errors", "config", "checkpoint", "data", "huggingface"},
        "parts": {
            *_BASE,
            *("build", "origin"),
            *("config", "data", "engine", "tables", "evaluation", "checkpoint", "report", "use"),
        },
        "run": {
            *_BASE,
            "config",
            "hardware",
            "memory",
            "checkpoint",
            "report",
            "run_state",
            "history",
            "parts",
            "trainer",
            "watch",
        },
    },
    "train/data": {
        "interruptible": set(),
        "remote": set(),
        "tokenization": {"interruptible", "remote"},
        "stores": {"remote", "tokenization"},
        "config": {"remote", "stores", "tokenization"},
        "phases": {"config"},
        "preparation": {"interruptible", "remote", "stores", "tokenization"},
        "batches": {"config", "stores"},
        "open": {"config", "preparation", "stores", "tokenization"},
        "blend": {"batches", "config", "open", "phases", "stores", "tokenization"},
    },
    "launch": {
        "local": set(),
        "plan": set(),
        "bench": {"local"},
        "cluster": {"local"},
        "doctor": {"local", "plan", "cluster"},
        "tune": {"local", "plan", "bench"},
        "commands": {"local", "plan", "bench", "cluster", "doctor", "tune"},
        "cli": {"local"},
        "__main__": {"local", "cli"},
    },
}
"""Rooms within a folder, and what each may import of it. Files that are in no room belong to all of them."""
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


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


def broken_rules(code: str, path: str) -> list[str]:
    """What the module at `path` (relative to the repository) imports but must not."""
    room = path.split("/")[0]
    broken = []
    for name, at_import in imports(code, path.rpartition("/")[0].replace("/", ".")):
        top = name.split(".")[0]
        if top in ROOMS and top != room and top not in ROOMS[room]:
            broken.append(f"{room} imports {name}")
        if top == room and path.startswith(f"{room}/"):
            broken += broken_inner_rules(name, path)
        if top == "tests":
            broken.append(f"{path} imports {name}")
        if top == "deepspeed" and not path.startswith("train/engine"):
            broken.append(f"{path} imports {name}: only train/engine may")
        if top == "wandb" and at_import:
            broken.append(f"{path} imports wandb when it is imported itself")
    return broken


def broken_inner_rules(name: str, path: str) -> list[str]:
    """What a module at `path` imports of its own folder but must not."""
    at, wanted = f"{path.removesuffix('.py')}/", f"{name.replace('.', '/')}/"
    broken = []
    for folder, inner in INNER.items():
        if not at.startswith(f"{folder}/") or not wanted.startswith(f"{folder}/"):
            continue
        mine, its = (where.removeprefix(f"{folder}/").split("/")[0] for where in (at, wanted))
        if mine in inner and its in inner and its not in {mine, *inner[mine]}:
            broken.append(f"{folder}/{mine} imports {name}")
    return broken


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import themselves, by whatever way."""

    def reached(start: str) -> set[str]:
        found: set[str] = set()
        waiting = list(graph[start])
        while waiting:
            if (name := waiting.pop()) not in found:
                found.add(name)
                waiting += graph[name]
        return found

    return [name for name in graph if name in reached(name)]


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


def test_every_room_has_its_rule() -> None:
    for folder, inner in INNER.items():
        rooms = {path.parent.name for path in (ROOT / folder).glob("*/__init__.py")}
        assert rooms <= inner.keys(), folder
        files = {path.stem for path in (ROOT / folder).glob("*.py")}
        assert inner.keys() <= rooms | files, folder


def test_imports_point_one_way() -> None:
    broken = {path: broken_rules(path.read_text(), path.relative_to(ROOT).as_posix()) for path in FILES}
    assert {path: rules for path, rules in broken.items() if rules} == {}


def names_of_auto_ep(code: str) -> list[str]:
    """Names in `code` that only the adapter to AutoEP should know."""
    return re.findall(r"AutoEP|auto_ep_layer|\.router\b|[\"']router\b|experts\.w\d|[\"']w[123][\"']", code)


def test_one_file_knows_auto_ep() -> None:
    adapter = ROOT / "train/engine/auto_ep.py"
    assert len(set(names_of_auto_ep(adapter.read_text()))) >= 5
    assert [path for path in FILES if names_of_auto_ep(path.read_text())] == [adapter]


def test_all_rooms_are_looked_at() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(ROOMS)


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
