"""Where a long text may be cut, so that the tokens of its parts are the tokens of the whole.

A place is told by the two characters beside it. It is one where the tokenizer's own pre-tokenizer cuts whatever the
text further off, and the text on either side is normalized and cut the same without the other. Which those are is
derived from the tokenizer's description, never tried; a tokenizer with anything that is not known here is not cut for.
"""

import functools
import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import tokenizers
from tokenizers import Regex, pre_tokenizers

from train.data.pattern import Atom, Matches, UnknownPattern, literal, matches_of

# Between two ASCII characters each of them does what it does to either side alone.
_LOCAL_NORMALIZERS = frozenset(("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "BertNormalizer"))
# These look at no more than two characters to tell whether they cut between them.
_LOCAL_PRE_TOKENIZERS = frozenset(("Whitespace", "WhitespaceSplit", "BertPreTokenizer", "Digits", "CharDelimiterSplit"))
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""The pattern in the library's ByteLevel."""

MayCut = Callable[[str, str], bool]
_Normalizer = Callable[[str], str]
"""A character as it is normalized; empty where what is beside it matters."""
_Stage = Callable[[str, str], bool | None]
"""Whether a stage of the pre-tokenizer allows a cut between two characters: None if it leaves that to later stages."""


class _Unknown(ValueError):
    """A part of a tokenizer that may look at text far off."""


def cuts_of(backend: tokenizers.Tokenizer) -> MayCut | None:
    """Whether a text may be cut between a character and the next; None for a tokenizer that needs texts whole."""
    description = json.loads(backend.to_str())
    try:
        normalizers = list(_normalizers(description["normalizer"]))
        stages = list(_stages(description["pre_tokenizer"]))
        joined = _joined(description["added_tokens"], backend)
    except (_Unknown, UnknownPattern):
        return None
    if not stages or description["model"].get("dropout"):
        return None

    @functools.lru_cache(1 << 16)
    def may_cut(before: str, after: str) -> bool:
        for normalizer in normalizers:
            before, after = normalizer(before), normalizer(after)
        if len(before) != 1 or len(after) != 1 or before + after in joined:
            return False
        decisions = (stage(before, after) for stage in stages)
        return next((decided for decided in decisions if decided is not None), False)

    return may_cut


class Part(NamedTuple):
    """A part of a text."""

    text: str
    last: bool


def parts(text: str, may_cut: MayCut, size: int) -> Iterator[Part]:
    """A text in parts of at least `size` characters, each as much longer as it takes to find a place for a cut."""
    begin, end = 0, 0
    while end < len(text):
        places = range(begin + size, len(text))
        end = next((place for place in places if may_cut(text[place - 1], text[place])), len(text))
        yield Part(text[begin:end], end == len(text))
        begin = end


def _normalizers(description: dict[str, Any] | None) -> Iterator[_Normalizer]:
    if description is None:
        return
    if description["type"] == "Sequence":
        for each in description["normalizers"]:
            yield from _normalizers(each)
        return
    single = description["type"] == "Replace" and len(description["pattern"].get("String", "")) == 1
    if description["type"] not in _LOCAL_NORMALIZERS and not single:
        raise _Unknown
    library = _alone("normalizer", description).normalizer
    assert library is not None
    yield lambda character: library.normalize_str(character) if single or character.isascii() else ""


def _joined(added_tokens: list[dict[str, Any]], backend: tokenizers.Tokenizer) -> frozenset[str]:
    """Pairs of characters that a token has which is looked for before all else."""
    # Special ones are text in a text.
    found = [token for token in added_tokens if not token["special"]]
    if any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in found):
        raise _Unknown
    names = {token["content"] for token in added_tokens}
    if backend.normalizer is not None:
        names |= {backend.normalizer.normalize_str(name) for name in names}
    return frozenset(pair for name in names for pair in map("".join, itertools.pairwise(name)))


def _stages(pre_tokenizer: dict[str, Any] | None) -> Iterator[_Stage]:
    if pre_tokenizer is None:
        return
    kind = pre_tokenizer["type"]
    if kind == "Sequence":
        for each in pre_tokenizer["pretokenizers"]:
            yield from _stages(each)
    elif kind == "Split":
        yield _split(pre_tokenizer["pattern"], pre_tokenizer["behavior"])
    elif kind == "ByteLevel":
        yield from _byte_level(pre_tokenizer)
    elif kind == "Metaspace":
        # The second part is not given a space, as it begins with one.
        yield lambda before, after: after == " " and pre_tokenizer["split"]
    elif kind in _LOCAL_PRE_TOKENIZERS or (kind == "Punctuation" and pre_tokenizer["behavior"] == "Isolated"):
        yield _pairwise(pre_tokenizer)
    else:
        raise _Unknown


def _byte_level(description: dict[str, Any]) -> Iterator[_Stage]:
    if description["add_prefix_space"]:
        yield lambda before, after: None if after == " " else False
    if description["use_regex"]:
        yield _between(matches_of(_GPT2))
    yield lambda before, after: False  # what follows sees other characters


def _split(pattern: dict[str, str], behavior: str) -> _Stage:
    if behavior not in ("Isolated", "Removed"):
        raise _Unknown
    return _between(literal(pattern["String"]) if "String" in pattern else matches_of(pattern["Regex"]))


def _between(matches: Matches) -> _Stage:
    """A stage that cuts before and after each match of a pattern."""
    atoms = matches.first | matches.last | {atom for pair in matches.next for atom in pair}
    tests = {atom: _test(atom) for atom in atoms if atom.pattern}
    folds = any(atom.pattern.startswith("(?i:") for atom in atoms)

    def decide(before: str, after: str) -> bool | None:
        if folds and any(each.lower() != each.upper() and not each.isascii() for each in (before, after)):
            return False
        ends = {atom for atom, test in tests.items() if test(before)}
        begins = {atom for atom, test in tests.items() if test(after)}
        # A match that has both, or one that looks from the one at the other.
        if any(one in ends and (other in begins or not other.pattern) for one, other in matches.next):
            return False
        return True if begins & matches.alone else None

    return decide


def _test(atom: Atom) -> Callable[[str], bool]:
    """Whether an atom matches a character, as the library itself sees it."""
    try:
        split = pre_tokenizers.Split(Regex(f"(?:{atom.pattern})"), "removed")
    except Exception:  # the library raises bare Exception
        raise UnknownPattern(atom.pattern) from None
    return lambda character: not split.pre_tokenize_str(character)


def _pairwise(description: dict[str, Any]) -> _Stage:
    library = _alone("pre_tokenizer", description).pre_tokenizer
    assert library is not None

    def decide(before: str, after: str) -> bool | None:
        pieces = library.pre_tokenize_str(before + after)
        return None if any(end - begin == 2 for _, (begin, end) in pieces) else True

    return decide


def _alone(part: str, description: dict[str, Any]) -> tokenizers.Tokenizer:
    """A tokenizer with one part."""
    model = {"type": "WordLevel", "vocab": {"?": 0}, "unk_token": "?"}
    return tokenizers.Tokenizer.from_str(json.dumps({"added_tokens": [], "model": model, part: description}))
