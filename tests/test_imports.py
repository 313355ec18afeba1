"""Holds the direction of imports: kernels <- model, offload <- train <- launch."""

import ast
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
}
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def imports(code: str, package: str) -> Iterator[tuple[str, bool]]:
    """Every module that `code`, a module of `package`, imports, and whether it does when it is imported itself."""
    tree = ast.parse(code)
    deferred = {
        child
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node not in deferred) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            yield ".".join([*parents, *filter(None, [node.module])]), node not in deferred


def broken_rules(code: str, path: str) -> list[str]:
    """What the module at `path` (relative to the repository) imports but must not."""
    room = path.split("/")[0]
    broken = []
    for name, at_import in imports(code, path.rpartition("/")[0].replace("/", ".")):
        top = name.split(".")[0]
        if top in ROOMS and top != room and top not in ROOMS[room]:
            broken.append(f"{room} imports {name}")
        if top == "tests":
            broken.append(f"{path} imports {name}")
        if top == "deepspeed" and not path.startswith("train/engine"):
            broken.append(f"{path} imports {name}: only train/engine may")
        if top == "wandb" and at_import:
            broken.append(f"{path} imports wandb when it is imported itself")
    return broken


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    assert broken_rules(path.read_text(), path.relative_to(ROOT).as_posix()) == []


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
        ("launch/a.py", "from tests.distributed import run_ranks", 1),
    ],
)
def test_the_rules_catch_what_they_should(path: str, code: str, count: int) -> None:
    assert len(broken_rules(code, path)) == count
