"""Sets values in the text of a YAML file and leaves all else as it is: comments, order, spaces.

PyYAML says where each value stands; the text between stays.
"""

from collections.abc import Mapping
from pathlib import Path
from shutil import copymode

import yaml

from train.config import yaml_text
from train.config.yaml_text import YamlValue
from train.errors import UserError
from train.files import new_file


def set_in_file(path: str, section: str, values: Mapping[str, YamlValue]) -> None:
    """Sets keys of a section in a config file, which is replaced as a whole.

    Raises:
        UserError: the text is written in a way that this does not know. The file is then as it was.
        OSError: it cannot be read or written.
    """
    target = Path(path).resolve()  # not a link to it
    text = target.read_text(encoding="utf-8")
    wanted = yaml_text.parse(text)
    assert isinstance(wanted, dict)
    before = wanted.get(section)
    wanted[section] = (before if isinstance(before, dict) else {}) | dict(values)
    try:
        for key, value in values.items():
            text = _with_value(text, section, key, yaml_text.render(value).strip())
        same = yaml_text.parse(text) == wanted
    except (ValueError, yaml.YAMLError):
        same = False
    if not same:
        told = ", ".join(f"{section}.{key}={yaml_text.render(value).strip()}" for key, value in values.items())
        raise UserError(f"{path}: cannot be changed without changing more of it; set {told} in it yourself")
    with new_file(target) as partial:
        partial.write_text(text, encoding="utf-8")
        copymode(target, partial)


def _with_value(text: str, section: str, key: str, value: str) -> str:
    """The text with one key of a section set."""
    found = _entry(yaml_text.compose(text), section)
    if found is None:
        return f"{_whole(text)}\n{section}:\n  {key}: {value}\n"
    there = _entry(found, key)
    if there is not None:
        start, end = there.start_mark.index, there.end_mark.index
        return text[:start] + ("" if end > start else " ") + value + text[end:]
    if not isinstance(found, yaml.MappingNode):  # null, or nothing
        before, after = text[: found.start_mark.index].rstrip(" "), text[found.end_mark.index :]
        return f"{before}\n  {key}: {value}{after}"
    if found.flow_style:
        end = found.end_mark.index - 1
        return f"{text[:end]}{', ' if found.value else ''}{key}: {value}{text[end:]}"
    indent, end = " " * found.value[0][0].start_mark.column, _end_of_line(text, _last(found))
    return f"{_whole(text[:end])}{indent}{key}: {value}\n{text[end:]}"


def _whole(lines: str) -> str:
    """Lines of which the last one has an end, too."""
    return lines if lines.endswith("\n") else lines + "\n"


def _entry(node: yaml.Node | None, key: str) -> yaml.Node | None:
    pairs = node.value if isinstance(node, yaml.MappingNode) else ()
    return next((value for name, value in pairs if name.value == key), None)


def _last(node: yaml.Node) -> yaml.Node:
    """What stands last in a block; its own end lies behind the comments that follow."""
    while isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        node = last[1] if isinstance(node, yaml.MappingNode) else last
    return node


def _end_of_line(text: str, node: yaml.Node) -> int:
    """The beginning of the line behind a value."""
    end = node.end_mark.index
    if text[:end].endswith("\n"):  # of text in several lines
        return end
    newline = text.find("\n", end)
    return len(text) if newline < 0 else newline + 1
