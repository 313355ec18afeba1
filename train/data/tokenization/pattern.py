"""What of a text a tokenizer's regular expression can match in one piece, told without any text.

A pattern (Oniguruma's syntax, as `tokenizers` has it) is read into its atoms, each of which matches one character, and
into which of them may follow one another: Glushkov's construction. Where no atom of a text's character `a` may be
followed by one of its next character `b`, no match has both.
"""

import re
from typing import NamedTuple

# A `?` behind braces makes them lazy, but for {2}, which becomes optional; a `+` there is one more quantifier.
_QUANTIFIER = re.compile(r"([?*+])(\+|\??)|\{(?:(\d+)\}|(?:(\d+),\d*|,\d+)\}\??)")
_ESCAPE = re.compile(r"\\(?:[sSdDwWhHrntvf]|[pP]\{\^?\w+\}|x\{[0-9a-fA-F]+\}|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|[^\w\s])")
_LOOK = re.compile(r"\(\?[=!]")
_UNFOLDED = re.compile(r"\\\w|\[[\^:]|[^\x00-\x7f]")
"""What may stand for a character of which several are the other case, as ß."""


class UnknownPattern(ValueError):
    """Something of a pattern of which this module knows not what it looks at."""


class Atom(NamedTuple):
    """One place in a pattern."""

    place: int
    """Its position in the text of the pattern."""
    pattern: str
    """A pattern of one character; empty for a look ahead at the next one, which takes none."""


class Matches(NamedTuple):
    """How the matches of a part of a pattern begin, go on and end."""

    empty: bool
    """Whether one may take no character, a look ahead left out of account."""
    surely_empty: bool
    """Whether one may take no character wherever it is tried."""
    first: frozenset[Atom]
    last: frozenset[Atom]
    next: frozenset[tuple[Atom, Atom]]
    """Atoms that may follow each other."""
    alone: frozenset[Atom]
    """Atoms whose character is a match wherever it is tried."""


_NOTHING = Matches(True, True, frozenset(), frozenset(), frozenset(), frozenset())


def matches_of(pattern: str) -> Matches:
    """The matches of a pattern.

    Raises:
        UnknownPattern: it may match without a character, looks behind or further ahead than one character, names
            places of the text, or has something else that is not known here.
    """
    reader = _Reader(pattern)
    matches = reader.choice("")
    if reader.at < len(pattern) or matches.empty:
        raise UnknownPattern(pattern)
    return matches


def literal(text: str) -> Matches:
    """The matches of a string that is no pattern."""
    matches = _NOTHING
    for place, character in enumerate(text):
        matches = _then(matches, _one(Atom(place, f"\\x{{{ord(character):x}}}")))
    return matches


def _one(atom: Atom) -> Matches:
    only = frozenset({atom})
    return Matches(False, False, only, only, frozenset(), only)


def _then(left: Matches, right: Matches) -> Matches:
    return Matches(
        left.empty and right.empty,
        left.surely_empty and right.surely_empty,
        left.first | (right.first if left.empty else frozenset()),
        right.last | (left.last if right.empty else frozenset()),
        left.next | right.next | {(a, b) for a in left.last for b in right.first},
        (left.alone if right.surely_empty else frozenset()) | (right.alone if left.surely_empty else frozenset()),
    )


def _either(left: Matches, right: Matches) -> Matches:
    return Matches(
        left.empty or right.empty,
        left.surely_empty or right.surely_empty,
        left.first | right.first,
        left.last | right.last,
        left.next | right.next,
        left.alone | right.alone,
    )


class _Reader:
    """Recursive descent through a pattern."""

    def __init__(self, pattern: str) -> None:
        self.pattern, self.at = pattern, 0

    def choice(self, flags: str) -> Matches:
        matches = self._sequence(flags)
        while self._take("|"):
            matches = _either(matches, self._sequence(flags))
        return matches

    def _sequence(self, flags: str) -> Matches:
        matches = _NOTHING
        while self.at < len(self.pattern) and self.pattern[self.at] not in "|)":
            matches = _then(matches, self._repeated(self._item(flags)))
        return matches

    def _repeated(self, once: Matches) -> Matches:
        while found := _QUANTIFIER.match(self.pattern, self.at):
            self.at = found.end()
            kind, possessive = found[1], found[2] == "+"
            least = int(kind == "+") if kind else int(found[3] or found[4] or 0)
            again = frozenset() if kind == "?" else frozenset((a, b) for a in once.last for b in once.first)
            once = once._replace(
                empty=once.empty or least == 0,
                # What a possessive one has taken is not given back to what follows.
                surely_empty=not possessive and (once.surely_empty or least == 0),
                next=once.next | again,
                alone=once.alone if least < 2 else frozenset(),
            )
        return once

    def _item(self, flags: str) -> Matches:
        place = self.at
        if look := _LOOK.match(self.pattern, self.at):
            self.at = look.end()
            seen = self.choice(flags)
            self._require(")")
            if seen.next or seen.empty:
                raise UnknownPattern(self.pattern)
            only = frozenset({Atom(place, "")})
            return Matches(True, False, only, only, frozenset(), frozenset())
        if self._take("("):
            inner = flags
            if self._take("?"):
                inner = "i" if self._take("i") else flags
                self._require(":")
            matches = self.choice(inner)
            self._require(")")
            return matches
        atom = self._character()
        if flags and _UNFOLDED.search(atom):
            raise UnknownPattern(self.pattern)
        return _one(Atom(place, f"(?i:{atom})" if flags else atom))

    def _character(self) -> str:
        begin = self.at
        if self.pattern[begin] == "[":
            self._skip_class()
        elif self.pattern[begin] == "\\":
            found = _ESCAPE.match(self.pattern, begin)
            if not found:
                raise UnknownPattern(self.pattern)
            self.at = found.end()
        elif self.pattern[begin] in "^$?*+{":
            raise UnknownPattern(self.pattern)
        else:
            self.at += 1
        return self.pattern[begin : self.at]

    def _skip_class(self) -> None:
        depth = 0
        while self.at < len(self.pattern):
            character = self.pattern[self.at]
            self.at += 2 if character == "\\" else 1
            depth += (character == "[") - (character == "]")
            if not depth:
                return
        raise UnknownPattern(self.pattern)

    def _take(self, text: str) -> bool:
        taken = self.pattern.startswith(text, self.at)
        self.at += len(text) if taken else 0
        return taken

    def _require(self, text: str) -> None:
        if not self._take(text):
            raise UnknownPattern(self.pattern)
