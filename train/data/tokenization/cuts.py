"""Where a long text may be cut, so that the tokens of its parts are the tokens of the whole.

A place is told by the two characters beside it. It is one where the tokenizer's own pre-tokenizer cuts whatever the
text further off, or over which its BPE can merge nothing, and the text on either side is normalized and cut the same
without the other. Which those are is derived from the tokenizer's description, never tried; a tokenizer with anything
that is not known here is not cut for.
"""

import functools
import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import tokenizers

from train.data.tokenization.pattern import UnknownPattern
from train.data.tokenization.stages import UnknownPart, normalizers_of, replaced_space, stages_of, steps

_WORD_OPTIONS = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
"""What makes the tokens of a BPE depend on more than which of its pairs are side by side."""

MayCut = Callable[[str, str], bool]


def cuts_of(backend: tokenizers.Tokenizer) -> MayCut | None:
    """Whether a text may be cut between a character and the next; None for a tokenizer that needs texts whole.

    Parts but the first are then for the tokenizer that `continuing` gives.
    """
    description = json.loads(backend.to_str())
    try:
        normalizers = list(normalizers_of(description["normalizer"]))
        stages = list(stages_of(description["pre_tokenizer"]))
        joined = _joined(description, backend)
    except (UnknownPart, UnknownPattern):
        return None
    if apart := _apart(description):
        stages.append(apart)
    if not stages or description["model"].get("dropout"):
        return None

    @functools.lru_cache(1 << 16)
    def may_cut(before: str, after: str) -> bool:
        for normalizer in normalizers:
            before, after = normalizer(before, after)
        if len(before) != 1 or len(after) != 1 or before + after in joined:
            return False
        decisions = (stage(before, after) for stage in stages)
        return next((decided for decided in decisions if decided is not None), False)

    return may_cut


def continuing(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same tokenizer for texts that go on from another: it puts nothing before them."""
    description = json.loads(backend.to_str())
    normalizers = list(steps(description["normalizer"], "normalizers"))
    kept = [each for each in normalizers if each["type"] != "Prepend"]
    at_the_start = [
        each
        for each in steps(description["pre_tokenizer"], "pretokenizers")
        if each["type"] == "Metaspace" and each["prepend_scheme"] == "first"
    ]
    if kept == normalizers and not at_the_start:
        return backend
    description["normalizer"] = {"type": "Sequence", "normalizers": kept}
    for each in at_the_start:
        each["prepend_scheme"] = "never"
    made = tokenizers.Tokenizer.from_str(json.dumps(description))
    made.encode_special_tokens = backend.encode_special_tokens
    return made


class Part(NamedTuple):
    """A part of a text."""

    text: str
    first: bool
    last: bool


def parts(text: str, may_cut: MayCut, size: int) -> Iterator[Part]:
    """A text in parts of at least `size` characters, each as much longer as it takes to find a place for a cut."""
    begin = 0
    for end in _ends(text, may_cut, size):
        yield Part(text[begin:end], begin == 0, end == len(text))
        begin = end


def longest_part(text: str, may_cut: MayCut | None, size: int) -> int:
    """Characters of the longest part of a text."""
    ends = [0, *(_ends(text, may_cut, size) if may_cut else [len(text)])]
    return max((end - begin for begin, end in itertools.pairwise(ends)), default=0)


def _ends(text: str, may_cut: MayCut, size: int) -> Iterator[int]:
    end = 0
    while end < len(text):
        places = range(end + size, len(text))
        end = next((place for place in places if may_cut(text[place - 1], text[place])), len(text))
        yield end


def _joined(description: dict[str, Any], backend: tokenizers.Tokenizer) -> frozenset[str]:
    """Pairs of characters that a token has which is looked for before all else."""
    added_tokens = description["added_tokens"]
    # Special ones are text in a text.
    found = [token for token in added_tokens if not token["special"]]
    if any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in found):
        raise UnknownPart("added_tokens")
    if found and any(each["type"] == "Prepend" for each in steps(description["normalizer"], "normalizers")):
        raise UnknownPart("Prepend")  # behind each of them too
    names = {token["content"] for token in added_tokens}
    if backend.normalizer is not None:
        names |= {backend.normalizer.normalize_str(name) for name in names}
    return frozenset(pair for name in names for pair in map("".join, itertools.pairwise(name)))


def _apart(description: dict[str, Any]) -> Callable[[str, str], bool] | None:
    """Whether a BPE has both characters and no token in which they are side by side: nothing is merged over the place.

    None for a model of which that cannot be said.
    """
    model = description["model"]
    before_it = [*steps(description["pre_tokenizer"], "pretokenizers")]
    # In bytes, which have a stage of their own against it, all pairs of a large vocabulary would be listed for nothing.
    in_characters = all(each["type"] != "ByteLevel" for each in before_it)
    if model["type"] != "BPE" or any(model.get(option) for option in _WORD_OPTIONS) or not in_characters:
        return None
    known = {token for token in model["vocab"] if len(token) == 1}
    pairs = {pair for token in model["vocab"] for pair in map("".join, itertools.pairwise(token))}
    space = next((space for space in map(replaced_space, before_it) if space != " "), " ")

    def apart(before: str, after: str) -> bool:
        before, after = before.replace(" ", space), after.replace(" ", space)
        return before in known and after in known and before + after not in pairs

    return apart
