"""Values set in a config file: nothing else of the file changes."""

from pathlib import Path

import pytest

from train.config import yaml_text
from train.config.yaml_edit import set_in_file
from train.errors import UserError

CONFIGS = sorted((Path(__file__).parents[3] / "configs").rglob("*.yaml"))
WANTED = {"depth": 4, "window_rows": 31_250, "engine": "zero_copy", "programs": None}


def changed(text: str, tmp_path: Path) -> str:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    set_in_file(str(path), "offload", WANTED)
    return path.read_text()


def test_the_value_alone_is_replaced_and_a_missing_key_is_added_behind_the_others(tmp_path: Path) -> None:
    text = """\
# A job.
offload:
  # Two steps.
  depth:   2   # as measured
  window_rows: 50_000
  optimizer:
    type: adam  # the paper's

# Afterwards.
eval: {every: 3}
"""
    assert changed(text, tmp_path) == text.replace("2   #", "4   #").replace("50_000", "31250").replace(
        "paper's\n", "paper's\n  engine: zero_copy\n  programs: null\n"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1", "a: 1\n\noffload:\n  depth: 4\n  window_rows: 31250\n  engine: zero_copy\n  programs: null\n"),
        (
            "offload: {depth: 1}  # short\na: 1\n",
            "offload: {depth: 4, window_rows: 31250, engine: zero_copy, programs: null}  # short\na: 1\n",
        ),
        (
            "offload: null  # nothing\na: 1\n",
            "offload:\n  depth: 4  # nothing\n  window_rows: 31250\n  engine: zero_copy\n  programs: null\na: 1\n",
        ),
        (
            "offload:\n    depth:\n    note: |\n        text\n",
            "offload:\n    depth: 4\n    note: |\n        text\n    window_rows: 31250\n    engine: zero_copy\n"
            "    programs: null\n",
        ),
    ],
    ids=["no section", "on one line", "an empty section", "an empty value and text in lines"],
)
def test_sections_of_other_forms(text: str, expected: str, tmp_path: Path) -> None:
    assert changed(text, tmp_path) == expected


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_every_config_of_the_project_keeps_its_other_lines(config: Path, tmp_path: Path) -> None:
    text = config.read_text()
    found = changed(text, tmp_path)
    values = yaml_text.parse(text)
    assert isinstance(values, dict)
    assert yaml_text.parse(found) == values | {"offload": (values.get("offload") or {}) | WANTED}
    gone = [line for line in text.splitlines() if line not in found.splitlines()]
    assert all(line.split(":")[0].strip() in WANTED for line in gone)


@pytest.mark.parametrize(
    "text",
    [
        "offload: {depth: &d 1}\ntrain: {steps: *d}\n",
        "train: {steps: &d 1}\noffload: {depth: *d}\n",
        "{offload: null}\n",
    ],
    ids=["an anchor", "an alias", "all on one line"],
)
def test_what_would_change_more_is_refused_and_the_file_stays(text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be changed .*; set offload.depth=4, .* in it yourself"):
        changed(text, tmp_path)
    assert (tmp_path / "job.yaml").read_text() == text


def test_a_link_and_the_file_s_mode_stay(tmp_path: Path) -> None:
    path, link = tmp_path / "there.yaml", tmp_path / "job.yaml"
    path.write_text("offload: {depth: 1}\n")
    path.chmod(0o640)
    link.symlink_to(path)
    set_in_file(str(link), "offload", {"depth": 2})
    assert link.is_symlink()
    assert path.read_text() == "offload: {depth: 2}\n"
    assert path.stat().st_mode & 0o777 == 0o640
