"""What the pages say of the code is so: diagrams have the arrows of the import rules, and files they name exist."""

import re
from pathlib import Path

import pytest

from tests.test_imports import INNER, ROOMS

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "architecture.md").read_text()
RULES = {"folders": ROOMS, **INNER}

Graph = dict[str, set[str]]


def drawn(text: str) -> dict[str, Graph]:
    """The diagrams that carry a name (`%% name`), as what each room points to."""
    diagrams = {}
    for name, body in re.findall(r"```mermaid\nflowchart \w+\n +%% ([\w/]+)\n(.*?)```", text, re.DOTALL):
        graph: Graph = {}
        for line in body.strip().splitlines():
            start, _, ends = line.strip().partition(" --> ")
            for room in start.split(" & "):
                graph.setdefault(room, set()).update(ends.split(" & ") if ends else ())
        for end in set().union(*graph.values()):
            graph.setdefault(end, set())
        diagrams[name] = graph
    return diagrams


def reached(graph: Graph, start: str) -> set[str]:
    return graph[start].union(*(reached(graph, end) for end in graph[start]))


def reduced(graph: Graph) -> Graph:
    """Without the arrows that lead where others lead as well."""
    return {
        start: {end for end in ends if not any(end in reached(graph, other) for other in ends - {end})}
        for start, ends in graph.items()
    }


def test_every_rule_is_drawn() -> None:
    assert drawn(TEXT).keys() == RULES.keys()


@pytest.mark.parametrize("name", RULES)
def test_the_diagram_has_the_rooms_and_arrows_of_the_rules(name: str) -> None:
    rules = reduced(RULES[name])
    assert drawn(TEXT)[name] == rules, "draw:\n" + "\n".join(
        f"    {room}{' --> ' * bool(ends)}{' & '.join(sorted(ends))}" for room, ends in rules.items()
    )


def test_a_difference_would_be_seen() -> None:
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
