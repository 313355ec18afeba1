"""Parts `tests` and `sanitizer`, over a checkout of two files and a sanitizer that is a script."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from launch.bench import checks
from launch.bench.checks import run_sanitizer, run_tests
from launch.bench.options import BenchOptions
from launch.bench.progress import Progress
from launch.bench.report import Section
from launch.cli import main
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
# Runs what it is given; finds the planted error (unless it is blind), and one in racecheck.
SANITIZER = """#!/bin/sh
[ "$PYTORCH_NO_CUDA_MEMORY_CACHING" = 1 ] || exit 3
tool=$2
while [ "$1" != kns=^_[a-z] ]; do shift; done
shift
case "$*" in *planted*) exit {planted};; esac
"$@" || exit $?
[ $tool = memcheck ] || {{ echo "========= RACECHECK SUMMARY: 1 hazard displayed"; exit 99; }}
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "tests" / "kernels"
    folder.mkdir(parents=True)
    (folder / "test_sum_triton.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\naddopts = -p no:cacheprovider\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setattr(checks, "find_spec", lambda name: None if name == "xdist" else name)
    return folder


def run(check: object, **options: float) -> dict[str, Section]:
    with Progress("check", active=False) as progress:
        return check(BenchOptions(**options), progress)  # type: ignore[operator, arg-type]


def test_gpu_tests_are_counted_and_failures_named(checkout: Path) -> None:
    found = run(run_tests)
    (row,) = found["tests"].rows
    assert [row[key] for key in ("passed", "failed", "skipped", "status")] == [1, 1, 1, "1 FAILED"]
    assert not found["tests"].measures[0].met
    (failure,) = found["failures"].rows
    assert failure["test"] == "tests.kernels.test_sum_triton.test_broken"
    assert "one is not two" in str(failure["why"])
    (left_out,) = run(run_tests, seconds=0.0)["tests"].rows
    assert left_out["status"] == "left out: no time was left"


def test_a_file_that_cannot_be_collected_or_does_not_end_has_not_passed(checkout: Path) -> None:
    (checkout / "test_sum_triton.py").write_text("import nothing_of_the_kind")
    assert run(run_tests)["tests"].rows[0]["status"] == "1 FAILED"
    (checkout / "test_sum_triton.py").write_text("import time\ntime.sleep(60)")
    assert "it took longer" in str(run(run_tests, seconds=1.5)["tests"].rows[0]["status"])


def sanitizer(folder: Path, monkeypatch: pytest.MonkeyPatch, *, planted: int) -> None:
    script = folder / "compute-sanitizer"
    script.write_text(SANITIZER.format(planted=planted))
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_the_sanitizer_judges_only_if_it_finds_what_was_planted(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkout / "test_sum_triton.py").write_text("import pytest\n@pytest.mark.gpu\ndef test_fine(): pass")
    sanitizer(tmp_path, monkeypatch, planted=99)
    section = run(run_sanitizer)["sanitizer"]
    assert [(row["tool"], row["status"]) for row in section.rows] == [
        ("memcheck", "passed"),
        ("racecheck", "ERRORS: RACECHECK SUMMARY: 1 hazard displayed"),
    ]
    assert section.measures[0].value == 1
    sanitizer(tmp_path, monkeypatch, planted=0)
    with pytest.raises(UserError, match="does not find a planted error"):
        run(run_sanitizer)


def test_what_is_missing_is_told_in_one_line(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(checks, "_TOOLKIT", "/nowhere")
    with pytest.raises(UserError, match=r"compute-sanitizer is not installed: .* put the toolkit's bin into PATH"):
        run(run_sanitizer)
    monkeypatch.chdir(checkout)
    with pytest.raises(UserError, match="in the root of a checkout"):
        run(run_tests)


def test_without_a_gpu_there_is_nothing_to_check() -> None:
    result = CliRunner().invoke(main, ["bench", "sanitizer", "--device", "cpu"])
    assert result.exit_code == 2
    assert "no GPU" in result.stderr
