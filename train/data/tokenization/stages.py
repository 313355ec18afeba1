"""What the parts of a tokenizer before its model do around a place in a text, told from the two characters there."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import tokenizers
from tokenizers import Regex, pre_tokenizers

from train.data.tokenization.pattern import Atom, Matches, UnknownPattern, literal, matches_of

# Between two ASCII characters each of them does what it does to either side alone.
_LOCAL_NORMALIZERS = frozenset(("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "BertNormalizer"))
# These make one character of an ASCII letter, or of < = >, and a mark behind it.
_COMPOSING_NORMALIZERS = frozenset(("NFC", "NFKC"))
# These look at no more than two characters to tell whether they cut between them.
_LOCAL_PRE_TOKENIZERS = frozenset(("Whitespace", "WhitespaceSplit", "BertPreTokenizer", "Digits", "CharDelimiterSplit"))
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""The pattern in the library's ByteLevel."""

Normalizer = Callable[[str, str], tuple[str, str]]
"""Two characters side by side as they are normalized; empty where what is beside them matters."""
Stage = Callable[[str, str], bool | None]
"""Whether a pre-tokenizer allows a cut between two characters; None if all its own cuts stay, and others may tell."""


class UnknownPart(ValueError):
    """A part of a tokenizer that may look at text far off."""


def normalizers_of(description: dict[str, Any] | None) -> Iterator[Normalizer]:
    """The normalizers of a description, but for one that puts something before the text.

    Raises:
        UnknownPart: one may look at text far off.
    """
    for each in steps(description, "normalizers"):
        single = each["type"] == "Replace" and len(each["pattern"].get("String", "")) == 1
        if each["type"] in _LOCAL_NORMALIZERS or single:
            yield _normalizer(each, any_character=single)
        elif each["type"] != "Prepend":
            raise UnknownPart(each["type"])


def stages_of(description: dict[str, Any] | None) -> Iterator[Stage]:
    """The stages of a pre-tokenizer's description.

    Raises:
        UnknownPart: one may look at text far off.
        UnknownPattern: one has a pattern of which this cannot be told.
    """
    space = " "
    for each in steps(description, "pretokenizers"):
        for stage in _stages(each):
            yield _behind(space, stage)
        space = replaced_space(each) if space == " " else space


def replaced_space(description: dict[str, Any]) -> str:
    """What a pre-tokenizer makes of a space."""
    return description["replacement"] if description["type"] == "Metaspace" else " "


def steps(description: dict[str, Any] | None, inner: str) -> Iterator[dict[str, Any]]:
    """What a description does one after another; `inner` is the key of a sequence's members."""
    if description is not None and description["type"] == "Sequence":
        for each in description[inner]:
            yield from steps(each, inner)
    elif description is not None:
        yield description


def _stages(description: dict[str, Any]) -> Iterator[Stage]:
    kind = description["type"]
    if kind == "Split":
        yield _split(description["pattern"], description["behavior"])
    elif kind == "ByteLevel":
        yield from _byte_level(description)
    elif kind == "Metaspace":
        yield _metaspace(description["prepend_scheme"], description["split"])
    elif kind in _LOCAL_PRE_TOKENIZERS or (kind == "Punctuation" and description["behavior"] == "Isolated"):
        yield _pairwise(description)
    else:
        raise UnknownPart(kind)


def _behind(space: str, stage: Stage) -> Stage:
    """A stage to which spaces come as another character."""
    return stage if space == " " else lambda before, after: stage(before.replace(" ", space), after.replace(" ", space))


def _normalizer(description: dict[str, Any], *, any_character: bool) -> Normalizer:
    library = _alone("normalizer", description).normalizer
    assert library is not None
    composes = description["type"] in _COMPOSING_NORMALIZERS

    def normalize(before: str, after: str) -> tuple[str, str]:
        known = any_character or (before + after).isascii()
        if not known or (composes and (after.isalpha() or after in "<=>")):
            return "", ""
        return library.normalize_str(before), library.normalize_str(after)

    return normalize


def _metaspace(prepend_scheme: str, splits: bool) -> Stage:
    # Nothing is put before what begins with a space.
    elsewhere = False if prepend_scheme == "always" else None
    return lambda before, after: (splits or None) if after == " " else elsewhere


def _byte_level(description: dict[str, Any]) -> Iterator[Stage]:
    if description["add_prefix_space"]:
        yield lambda before, after: None if after == " " else False
    if description["use_regex"]:
        yield _between(matches_of(_GPT2))
    yield lambda before, after: False  # what follows sees other characters


def _split(pattern: dict[str, str], behavior: str) -> Stage:
    stage = _between(literal(pattern["String"]) if "String" in pattern else matches_of(pattern["Regex"]))
    if behavior in ("Isolated", "Removed"):
        return stage

    def joining(before: str, after: str) -> bool | None:
        # Where a match is joined to what is beside it, there is no cut; to those further off it makes no difference.
        return False if stage(before, after) is False else None

    return joining


def _between(matches: Matches) -> Stage:
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


def _pairwise(description: dict[str, Any]) -> Stage:
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
