"""The sanitizer's script, over a checkout of one file and a sanitizer that is a script itself."""

import ast
import re
import sys
from pathlib import Path

import pytest

from tests.gpu import sanitizer
from train.errors import UserError

TESTS = """
import pytest
def test_elsewhere(): assert False
@pytest.mark.gpu
def test_fine(): pass
@pytest.mark.gpu
def test_skipped(): pytest.skip("no such thing")
@pytest.mark.gpu
def test_broken(): assert 1 == 2, "one is\\n  not two"
"""
FINE = "import pytest\n@pytest.mark.gpu\ndef test_fine(): pass"
# Runs what it is given; finds the planted error (unless it is blind), and one in racecheck (unless all is clean).
SCRIPT = """#!/bin/sh
[ "$PYTORCH_NO_CUDA_MEMORY_CACHING" = 1 ] || exit 3
tool=$2
while [ "$1" != kns=^_[a-z] ]; do shift; done
shift
case "$*" in *planted*) exit {planted};; esac
"$@" || exit $?
[ $tool = memcheck ] || {{ echo "========= RACECHECK SUMMARY: {hazards} hazard displayed"; exit {racecheck}; }}
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "tests" / "kernels" / "sum"
    folder.mkdir(parents=True)
    (folder / "test_triton.py").write_text(FINE)
    (folder / "test_on_a_cpu.py").write_text("def test_elsewhere(): pass")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\naddopts = -p no:cacheprovider\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    return folder


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def write(*, planted: int = 99, hazards: int = 0) -> None:
        script = tmp_path / "compute-sanitizer"
        script.write_text(SCRIPT.format(planted=planted, hazards=hazards, racecheck=99 if hazards else 0))
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    return write


def exit_code(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["sanitizer", *arguments])
    with pytest.raises(SystemExit) as ended:
        sanitizer.main()
    return ended.value.code


def test_gpu_tests_are_counted_and_failures_named(checkout: Path, install, monkeypatch, capsys) -> None:
    install()
    (checkout / "test_triton.py").write_text(TESTS)
    assert exit_code(monkeypatch) == 1
    told = capsys.readouterr().out
    assert "memcheck sum/test_triton.py: 1 FAILED (1 passed, 1 failed, 1 skipped" in told
    assert "tests.kernels.sum.test_triton.test_broken: AssertionError: one is not two" in told


def test_what_it_finds_is_told_in_its_own_words(checkout: Path, install, monkeypatch, capsys) -> None:
    install(hazards=1)
    assert [(found.tool, found.status, found.clean) for found in sanitizer.check(None)] == [
        ("memcheck", "passed", True),
        ("racecheck", "ERRORS: RACECHECK SUMMARY: 1 hazard displayed", False),
    ]
    install()
    assert exit_code(monkeypatch, "--seconds", "60") == 0


def test_a_file_that_cannot_be_collected_or_does_not_end_is_not_clean(checkout: Path, install) -> None:
    install()
    (checkout / "test_triton.py").write_text(f"{FINE}\nimport nothing_of_the_kind")
    assert next(sanitizer.check(None)).status == "1 FAILED"
    (checkout / "test_triton.py").write_text(f"{FINE}\nimport time\ntime.sleep(60)")
    late, left_out = sanitizer.check(1.5)
    assert "it took longer" in late.status
    assert not late.clean
    assert left_out.status == "left out: no time was left"


def test_it_judges_only_if_it_finds_what_was_planted(checkout: Path, install, monkeypatch, capsys) -> None:
    install(planted=0)
    assert exit_code(monkeypatch) == 2
    assert "does not find a planted error" in capsys.readouterr().err


def test_what_is_missing_is_told_in_one_line(checkout: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(sanitizer, "_TOOLKIT", "/nowhere")
    with pytest.raises(UserError, match=r"compute-sanitizer is not installed: .* put the toolkit's bin into PATH"):
        next(sanitizer.check(None))
    monkeypatch.chdir(checkout)
    with pytest.raises(UserError, match="in the root of a checkout"):
        next(sanitizer.check(None))


def test_there_is_a_file_to_check_in_every_room_with_kernels() -> None:
    rooms = {path.parent for path in Path("kernels").rglob("*triton.py")}
    tested = {Path("kernels", path.parent.relative_to("tests/kernels")) for path in sanitizer.files()}
    assert rooms <= tested
    assert {"test_add_rows.py", "test_adam_rates.py", "test_triton.py"} <= {path.name for path in sanitizer.files()}


def test_every_kernel_that_is_launched_has_a_name_that_is_checked() -> None:
    functions = [
        node
        for path in Path("kernels").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(each) for each in node.decorator_list)
    ]
    # A function that no other one calls is there to be launched.
    called = {name.id for function in functions for name in ast.walk(function) if isinstance(name, ast.Name)}
    launched = {function.name for function in functions} - called
    assert launched >= {"_fetch_lines", "_hash_kernel"}
    assert not [name for name in launched if not re.match(sanitizer.OURS.removeprefix("kns="), name)]
    assert sanitizer.OURS in Path("tests/gpu/lent.sh").read_text(), "which has the same filter"
