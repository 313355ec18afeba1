"""YAML 1.2 in and out: what a config file means, and nothing of what it is for.

PyYAML follows YAML 1.1, where `4e-4` is text, `010` is eight, `off` is false and a repeated key silently wins. Here
scalars follow the core schema of YAML 1.2 (section 10.3.2 of its specification), with one addition: digits may be
grouped, as in `2_000_000`. Keys must be text and may occur once.
"""

import re
from typing import Any, TypeAlias

import yaml

YamlValue: TypeAlias = bool | int | float | str | list[Any] | dict[str, Any] | None
"""What a document can hold."""

_MOST_DEPTH = 64
_MOST_VALUES = 1_000_000
_TAG = "tag:yaml.org,2002:"
_SCALARS = (
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+(?:_[0-9]+)*|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:_[0-9]+)*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012 - PyYAML's own class attribute, emptied


class _Dumper(yaml.SafeDumper):
    """Adds the 1.2 forms to PyYAML's own, so that text that either version could misread is quoted."""

    def serialize(self, node: yaml.Node) -> None:
        if isinstance(node, yaml.CollectionNode):
            node.flow_style = False
        super().serialize(node)

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = node.value
    return int(text, 0 if text[1:2] in ("o", "x") else 10)


def _construct_float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    return float(re.sub(r"\.(?=inf|nan)", "", node.value.lower()))


def _construct_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(None, None, "a key must be text; quote it", key_node.start_mark)
        if key in mapping:
            raise yaml.constructor.ConstructorError(None, None, f"{key}: this key appears twice", key_node.start_mark)
        mapping[key] = loader.construct_object(value_node, deep=True)
    return mapping


def _construct_sequence(loader: yaml.SafeLoader, node: yaml.SequenceNode) -> list[Any]:
    return loader.construct_sequence(node, deep=True)


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar(_TAG + "str", text, style=None if text.isprintable() else '"')


for _name, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _starts = ["" if start == "\0" else start for start in _first]
        _class.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern})\Z"), _starts)
_Loader.add_constructor(_TAG + "int", _construct_int)
_Loader.add_constructor(_TAG + "float", _construct_float)
_Loader.add_constructor(_TAG + "map", _construct_mapping)
_Loader.add_constructor(_TAG + "seq", _construct_sequence)
_Dumper.add_representer(str, _represent_text)


def parse(text: str) -> YamlValue:
    """The value of one YAML document; None if it is empty.

    Raises:
        ValueError: not one YAML document, a key that is not text or occurs twice, or more than a config can mean; one
            line, with the line number where there is one.
    """
    try:
        value: YamlValue = yaml.load(text, _Loader)
        _require_bounded(value)
        return value
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark else ""
        context = f" ({error.context})" if error.context else ""
        raise ValueError(where + " ".join(f"{error.problem}{context}".split())) from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


def compose(text: str) -> yaml.Node | None:
    """Where everything stands in a text that `parse` reads."""
    node: yaml.Node | None = yaml.compose(text, _Loader)
    return node


def _require_bounded(value: YamlValue) -> None:
    """Refuses what aliases make too large, and what is nested deeper than other code can follow."""
    pending, count = [(value, 0)], 0
    while pending:
        part, depth = pending.pop()
        count += 1
        if depth > _MOST_DEPTH:
            raise ValueError("nested too deeply")
        if count > _MOST_VALUES:
            raise ValueError(f"more than {_MOST_VALUES:,} values, aliases counted where they stand")
        inner = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        pending += [(each, depth + 1) for each in inner]


def render(value: YamlValue) -> str:
    """One YAML document that `parse` reads as `value`; leaves of a collection are on one line."""
    text = yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None, width=float("inf")
    )
    # The mark of a document's end, not a text that ends so.
    return text.removesuffix("...\n") if text.endswith("\n...\n") else text
