"""Job files: YAML, `extends`, overrides from the command line, and the resolved config written back.

A file may name a base with `extends: other.yaml` (relative to itself; bases may extend further). Mappings are merged
key by key, everything else is replaced, overrides (`section.key=value`) come last. Every value remembers where it was
written, so that a mistake is reported with the file to open.
"""

import difflib
import json
import os
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, RootModel, ValidationError
from pydantic_core import to_jsonable_python

from train.config import yaml_text
from train.config.errors import KeyPath, Schema, describe, dotted
from train.errors import UserError
from train.files import new_file, require_regular

COMMAND_LINE = "command line"
"""The source that messages name for an override."""

_HEADER = "# The resolved config of a run: every key with its value. It is itself a valid config.\n"
_COMMENT_WIDTH = 100
_MOST_TOLD = 12
"""Mistakes that are reported at once: a file that is not a job at all has one per key."""

Config = TypeVar("Config", bound=BaseModel)


@dataclass
class _Document:
    """Merged values, and the source of every mapping and leaf in them."""

    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[KeyPath, str] = field(default_factory=dict)

    def merge(self, values: dict[str, Any], source: str) -> None:
        """Lays `values`, written in `source`, over what is there."""
        self._merge(self.values, values, (), source)

    def _merge(self, into: dict[str, Any], values: dict[str, Any], prefix: KeyPath, source: str) -> None:
        for key, value in values.items():
            path = (*prefix, key)
            if not (isinstance(value, dict) and isinstance(into.get(key), dict)):
                self.sources = {old: name for old, name in self.sources.items() if old[: len(path)] != path}
                into[key] = {} if isinstance(value, dict) else value
                self.sources[path] = source
            if isinstance(value, dict):
                self._merge(into[key], value, path, source)

    def source(self, path: KeyPath, whole: bool, default: str) -> str:
        """Where `path` was written; for a `whole` section, all the places that wrote a value of it, oldest first."""
        if whole:
            written = [name for key, name in self.sources.items() if key[: len(path)] == path and self._is_leaf(key)]
            if written:
                return " + ".join(sorted(set(written), key=lambda name: (name == COMMAND_LINE, name == default)))
        known = [self.sources[path[:end]] for end in range(len(path), 0, -1) if path[:end] in self.sources]
        return known[0] if known else default

    def source_of(self, path: KeyPath, default: str) -> str:
        """Where what is wrong at `path` was written."""
        value: Any = self.values
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        return self.source(path, whole=isinstance(value, dict), default=default)

    def _is_leaf(self, path: KeyPath) -> bool:
        value: Any = self.values
        for key in path:
            value = value[key]
        return not isinstance(value, dict)


def load(path: str | os.PathLike[str], overrides: Sequence[str], schema: type[Config]) -> Config:
    """The config in `path`, with `overrides` of the form `section.key=value` (the value is YAML) laid over it.

    Raises:
        UserError: a file that is missing or not a YAML mapping, bases in a circle, an unknown key, a value that the
            schema does not allow. One line, with ` | ` between mistakes: the source, the key path, what is allowed.
    """
    name = os.fspath(path)
    document = _Document()
    for source, values in _chain(name):
        document.merge(values, source)
    for override in overrides:
        document.merge(_override(override), COMMAND_LINE)
    try:
        # As JSON, since there a strict schema still accepts text for a path and a list for a tuple.
        return schema.model_validate_json(json.dumps(document.values))
    except ValidationError as error:
        found = describe(error, document.values, Schema(schema))
        told = [
            ": ".join(filter(None, (document.source_of(where, name), dotted(where), found[where]))) for where in found
        ]
        more = f" | and {len(told) - _MOST_TOLD} more" if len(told) > _MOST_TOLD else ""
        raise UserError(" | ".join(told[:_MOST_TOLD]) + more) from None


def base_of(path: str | os.PathLike[str]) -> tuple[str, dict[str, Any]]:
    """Name and values of what a config file extends, with the bases of that; of the file itself if it extends none.

    Raises:
        UserError: as `load`.
    """
    chain = _chain(os.fspath(path))
    document = _Document()
    for source, values in chain[:-1] or chain:
        document.merge(values, source)
    return (chain[-2] if len(chain) > 1 else chain[0])[0], document.values


def _chain(name: str) -> list[tuple[str, dict[str, Any]]]:
    """The file and its bases with their values, the outermost base first."""
    chain: list[tuple[str, dict[str, Any]]] = []
    seen: dict[Path, str] = {}
    while True:
        real = Path(name).resolve()
        if real in seen:
            raise UserError(f"{chain[-1][0]}: extends: goes in a circle: {' -> '.join([*seen.values(), name])}")
        seen[real] = name
        values = _read(name, chain[-1][0] if chain else None)
        base = values.pop("extends", None)
        chain.append((name, values))
        if base is None:
            return chain[::-1]
        if not isinstance(base, str):
            raise UserError(f"{name}: extends: expected the name of one file, got {json.dumps(base)}")
        name = os.path.normpath(Path(name).parent / base)


def _read(name: str, extended_by: str | None) -> dict[str, Any]:
    try:
        require_regular(Path(name))
        text = Path(name).read_text(encoding="utf-8")
    except OSError as error:
        via = f" (named by extends in {extended_by})" if extended_by else ""
        raise UserError(f"{name}: {(error.strerror or str(error)).lower()}{_near_file(name)}{via}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 text (byte {error.start})") from None
    try:
        values = yaml_text.parse(text)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None
    if not isinstance(values, dict):
        found = "nothing" if values is None else type(values).__name__
        raise UserError(f"{name}: expected a mapping of sections such as `train:`, found {found}")
    return values


def _near_file(name: str) -> str:
    path = Path(name)
    try:
        if path.exists() or not path.parent.is_dir():
            return ""
    except OSError:  # a name that is too long
        return ""
    siblings = [each.name for each in path.parent.glob("*.y*ml")]
    near = difflib.get_close_matches(path.name, siblings, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _override(text: str) -> dict[str, Any]:
    """`a.b=1` as `{"a": {"b": 1}}`."""
    key, equals, value_text = text.partition("=")
    names = key.split(".")
    if not (equals and value_text.strip() and all(name.strip() == name != "" for name in names)):
        raise UserError(f"{COMMAND_LINE}: expected section.key=value, got {json.dumps(text, ensure_ascii=False)}")
    if names == ["extends"]:
        raise UserError(f"{COMMAND_LINE}: extends: belongs in a file; give the file to extend as CONFIG")
    try:
        value: Any = yaml_text.parse(value_text)
    except ValueError as error:
        raise UserError(f"{COMMAND_LINE}: {key}: not a YAML value ({error})") from None
    for name in reversed(names):
        value = {name: value}
    return value


def dump(config: BaseModel, path: str | os.PathLike[str]) -> None:
    """Writes `config` as YAML that loads back to an equal config, each field under its documentation.

    The file appears whole or not at all.

    Raises:
        OSError: the folder is missing, not writable or full.
    """
    with new_file(Path(path)) as partial:
        partial.write_text(dumps(config), encoding="utf-8")


def dumps(config: BaseModel) -> str:
    """The text that `dump` writes."""
    return _HEADER + "".join(_lines(config))


def _lines(section: BaseModel, depth: int = 0) -> Iterator[str]:
    indent = "  " * depth
    fields = type(section).model_fields
    # Not mode="json": under keys without a type that turns infinity into null.
    for name, rendered in to_jsonable_python(section.model_dump()).items():  # with the extra keys of an open section
        yield "\n" if depth == 0 else ""
        description = fields[name].description if name in fields else None
        for paragraph in (description or "").split("\n\n"):
            yield from (f"{indent}# {line}\n" for line in textwrap.wrap(paragraph, _COMMENT_WIDTH))
        value = getattr(section, name)
        if isinstance(value, BaseModel) and not isinstance(value, RootModel) and rendered:
            yield f"{indent}{name}:\n"
            yield from _lines(value, depth + 1)
        else:
            yield textwrap.indent(yaml_text.render({name: rendered}), indent)
