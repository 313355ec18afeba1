"""What the pages say of the code is so: the files that they name exist."""

import re
from pathlib import Path

import pytest

from tests.diagrams import drawn, reduced

ROOT = Path(__file__).parents[1]


def test_a_diagram_is_read() -> None:
    text = "```mermaid\nflowchart LR\n    %% folders\n    a & b --> c & d\n    c --> d\n    e\n```"
    assert drawn(text)["folders"] == {"a": {"c", "d"}, "b": {"c", "d"}, "c": {"d"}, "d": set(), "e": set()}
    assert reduced(drawn(text)["folders"]) == {"a": {"c"}, "b": {"c"}, "c": {"d"}, "d": set(), "e": set()}


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMED = re.compile(r"`((?:kernels|model|offload|train|launch|serve|tests|configs|docs)/[\w./*{},-]*)(?:::[\w*]+)?`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text()
    links = [(page.parent / link).resolve() for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text)]
    missing = [str(link) for link in links if not link.exists()]
    for name in NAMED.findall(text):
        missing += [found for found in alternatives(name) if not any(ROOT.glob(found))]
    assert missing == []


def test_tests_that_the_hazards_name_exist() -> None:
    text = (ROOT / "docs" / "hazards.md").read_text()
    tests = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    files = {name.rpartition("/")[2] for name in re.findall(r"`([\w/]*test_\w+\.py)", text)}
    assert files <= tests.keys()
    for name in re.findall(r"::(\w+)", text):
        assert any(re.search(rf"(def |class |^){name}", code, re.MULTILINE) for code in tests.values()), name


def alternatives(name: str) -> list[str]:
    """`a/{b,c}.py` names two files."""
    before, brace, rest = name.partition("{")
    inside, _, after = rest.partition("}")
    return [before + part + after for part in inside.split(",")] if brace else [name]
