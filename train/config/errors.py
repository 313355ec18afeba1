"""Turns what pydantic finds wrong with a config into one line: the key path, what is allowed, the nearest right name.

Everything about the schema is read from its JSON Schema, so that a message never falls behind the declaration.
"""

import difflib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

KeyPath = tuple[str | int, ...]
"""Keys and list positions from the root of a config to one of its values."""

_LIMITS = {"greater_than", "greater_than_equal", "less_than", "less_than_equal", "multiple_of", "too_short", "too_long"}
_FORMS = {"literal_error", "enum", "int_from_float", "string_too_short", "string_too_long", "string_pattern_mismatch"}
_ELSEWHERE_CUTOFF = 0.8
_SECTION_CUTOFF = 0.6
_SECTION_BONUS = 0.1


class Schema:
    """The JSON Schema of a config's root model, walked by key path."""

    def __init__(self, model: type[BaseModel]) -> None:
        self._root = model.model_json_schema()

    def _branches(self, node: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """The alternatives of a node, with references followed."""
        if "$ref" in node:
            return self._branches(self._root["$defs"][node["$ref"].rsplit("/", 1)[-1]])
        alternatives = node.get("anyOf") or node.get("oneOf") or node.get("allOf")
        return [branch for each in alternatives for branch in self._branches(each)] if alternatives else [node]

    def at(self, path: KeyPath) -> dict[str, Any]:
        """The node that describes the value at `path`; `{}` if the schema says nothing about it."""
        node: dict[str, Any] = self._root
        for key in path:
            node = {"anyOf": list(self._children(node, key))}
            if not node["anyOf"]:
                return {}
        return node

    def _children(self, node: Mapping[str, Any], key: str | int) -> Iterator[Mapping[str, Any]]:
        for branch in self._branches(node):
            if key in branch.get("properties", {}):
                yield branch["properties"][key]
            elif isinstance(key, int) and "items" in branch:
                yield branch["items"]
            elif isinstance(branch.get("additionalProperties"), dict):
                yield branch["additionalProperties"]

    def keys(self, path: KeyPath) -> list[str]:
        """Names of the fields of the section at `path`, in the order of declaration."""
        return [name for branch in self._branches(self.at(path)) for name in branch.get("properties", {})]

    def fields(self, prefix: KeyPath = ()) -> Iterator[KeyPath]:
        """Paths of all fields of all sections below `prefix`, parents first."""
        for name in self.keys(prefix):
            path = (*prefix, name)
            yield path
            yield from self.fields(path)

    def expected(self, path: KeyPath) -> str:
        """What is allowed at `path`, such as `an integer >= 1 or null`."""
        if not (node := self.at(path)):
            return "another value"
        return " or ".join(dict.fromkeys(map(self._describe, self._branches(node))))

    def _describe(self, node: Mapping[str, Any]) -> str:
        if choices := node.get("enum") or ([node["const"]] if "const" in node else None):
            shown = ", ".join(choice if isinstance(choice, str) else json.dumps(choice) for choice in choices)
            return f"one of {shown}" if len(choices) > 1 else shown
        kind = node.get("type")
        if kind == "array":
            items = " or ".join(dict.fromkeys(map(self._describe, self._branches(node.get("items", {})))))
            return f"a list{_range(node)}" + (f", each {items}" if items != "any value" else "")
        names = {"integer": "an integer", "number": "a number", "string": "text", "boolean": "true or false"}
        names |= {"object": "a mapping of keys", "null": "null"}
        return names.get(str(kind), "any value") + _range(node)


def _range(node: Mapping[str, Any]) -> str:
    limits = [
        f" {sign} {node[name]:g}" if not isinstance(node[name], int) else f" {sign} {node[name]}"
        for name, sign in (("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="), ("exclusiveMaximum", "<"))
        if name in node
    ]
    text = " and".join(limits)
    text += f", a multiple of {node['multipleOf']}" if "multipleOf" in node else ""
    text += f" matching {node['pattern']}" if "pattern" in node else ""
    for unit, least, most in (("characters", "minLength", "maxLength"), ("items", "minItems", "maxItems")):
        text += f" of at least {node[least]} {unit}" if least in node else ""
        text += f" of at most {node[most]} {unit}" if most in node else ""
    return text


def describe(error: ValidationError, data: Any, schema: Schema) -> dict[KeyPath, str]:
    """One-line messages of all mistakes in `data`, by key path.

    Unknown keys come first, since a mistyped key is often also the reason why another one is missing.
    """
    found: dict[KeyPath, ErrorDetails] = {}
    for details in sorted(error.errors(include_url=False), key=lambda each: each["type"] != "extra_forbidden"):
        found.setdefault(_path(details, data), details)
    return {path: " ".join(_message(path, details, schema).split()) for path, details in found.items()}


def _path(details: ErrorDetails, data: Any) -> KeyPath:
    """The error's location without what pydantic mixes in: names of union branches, `[key]`."""
    path: list[str | int] = []
    for position, key in enumerate(details["loc"]):
        here = isinstance(data, Mapping) and key in data
        if here or (isinstance(data, list) and isinstance(key, int)):
            path.append(key)
            data = data[key]
        elif details["type"] == "missing" and position == len(details["loc"]) - 1:
            path.append(key)
    return tuple(path)


def _message(path: KeyPath, details: ErrorDetails, schema: Schema) -> str:
    kind = details["type"]
    if kind == "extra_forbidden":
        return unknown_key(path, schema)
    if kind == "missing":
        return f"missing; expected {schema.expected(path)}"
    cause = details.get("ctx", {}).get("error")
    if kind in ("value_error", "assertion_error") and cause is not None:
        return str(cause)
    if kind.endswith("_type") or kind in _LIMITS | _FORMS:
        return f"expected {schema.expected(path)}, got {_shown(details['input'])}"
    if kind == "finite_number":
        return f"expected {schema.expected(path).replace('a number', 'a finite number')}, got {details['input']}"
    return f"{details['msg'][:1].lower()}{details['msg'][1:]}, got {_shown(details['input'])}"


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def unknown_key(path: KeyPath, schema: Schema) -> str:
    """The message for a key that its section does not have: nearest right names, here or elsewhere, and all allowed."""
    section, allowed = path[:-1], ", ".join(schema.keys(path[:-1]))
    near = [dotted(each) for each in _nearest(path, schema)]
    if dotted(path) in near:
        parent, _, key = dotted(path).rpartition(".")
        return f"unknown key; in a file, write {key} as a key under {parent}"
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    place = "sections" if not section else "allowed"
    return f"unknown key{hint} ({place}: {allowed})" if allowed else f"unknown key{hint}"


def _nearest(path: KeyPath, schema: Schema) -> list[KeyPath]:
    """Fields whose name is most like the last key of `path`; an equal name in another section beats a similar one."""
    name, section = str(path[-1]).rsplit(".", 1)[-1], path[:-1]
    scores: dict[KeyPath, float] = {}
    for field in schema.fields():
        same = field[:-1] == section
        score = difflib.SequenceMatcher(None, name.lower(), str(field[-1]).lower()).ratio()
        if score >= (_SECTION_CUTOFF if same else _ELSEWHERE_CUTOFF):
            scores[field] = score + _SECTION_BONUS * same
    best = max(scores.values(), default=0.0)
    return [field for field, score in scores.items() if score == best][:3]


def dotted(path: KeyPath) -> str:
    """`("train", "steps")` as `train.steps`, the form of overrides."""
    return ".".join(map(str, path))
