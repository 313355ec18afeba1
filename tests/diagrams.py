"""Graphs of what imports what, as the pages draw them."""

import re

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
    """What arrows lead to from a room, by whatever way."""
    found: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        if (name := waiting.pop()) not in found:
            found.add(name)
            waiting += graph[name]
    return found


def circles(graph: Graph) -> list[str]:
    """What reaches itself."""
    return [name for name in graph if name in reached(graph, name)]


def reduced(graph: Graph) -> Graph:
    """Without the arrows that lead where others lead as well. Of a graph without circles."""
    return {
        start: {end for end in ends if not any(end in reached(graph, other) for other in ends - {end})}
        for start, ends in graph.items()
    }
