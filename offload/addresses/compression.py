"""Tokenizer compression: tokens that spell the same text up to case, accents and spaces share one id.

V vocabulary.
"""

import hashlib
from dataclasses import dataclass

import torch
from tokenizers import Regex, Tokenizer, normalizers
from torch import Tensor

_LONE_SPACE = "\ue000"  # private use: keeps a token that is one space from being stripped to nothing
_NO_TEXT = "\ufffd"  # what decoding shows for bytes that are not text by themselves


@dataclass(frozen=True, eq=False)
class CompressedVocabulary:
    """A map from token ids onto dense compressed ids."""

    map: Tensor
    """int64 [V], on the CPU: the compressed id of every token id; takes every value in [0, size)."""
    size: int
    """Number of compressed ids. The multipliers of the hash derive from it, so it decides every address."""
    pad_id: int
    """Compressed id of the padding token."""

    def compress(self, tokens: Tensor) -> Tensor:
        """Compressed ids (int64, of the same shape) of integer token ids on the CPU.

        Raises:
            ValueError: a token id is outside the vocabulary.
        """
        self.check(tokens)
        return self.map[tokens.long()]

    def check(self, tokens: Tensor) -> None:
        """Refuses token ids on the CPU that are outside the vocabulary.

        Raises:
            ValueError: one is.
        """
        if tokens.numel() > 0:
            low, high = (int(bound) for bound in tokens.aminmax())
            if low < 0 or high >= len(self.map):
                raise ValueError(
                    f"token id {low if low < 0 else high} is outside the vocabulary of {len(self.map)} ids: "
                    "prepare the data with the tokenizer of this job"
                )

    def digest(self) -> str:
        """SHA-256 of the map, in hexadecimal.

        Trailing ids that map like the padding token do not count: padding the model's vocabulary changes no address.
        """
        mapped = (self.map != self.pad_id).nonzero()
        length = int(mapped[-1]) + 1 if len(mapped) else 0
        return hashlib.sha256(self.map[:length].numpy().astype("<i8").tobytes()).hexdigest()


def compress_tokenizer(
    tokenizer: Tokenizer, *, pad_id: int | None = None, vocabulary_size: int | None = None
) -> CompressedVocabulary:
    """Compresses a vocabulary as the released models do (Engram, arXiv 2601.07372, section 2.2 and appendix C).

    In ascending order of ids, a token with a new key takes the next compressed id. The key is the token's normalised
    text, or the text itself where nothing is left of it, or the raw token where it is not text by itself.

    Args:
        tokenizer: the tokenizer, with its added tokens.
        pad_id: raw id of the padding token, by default that of `find_pad_id`.
        vocabulary_size: number of token ids of the model, where it is padded beyond the tokenizer's. Ids without a
            token map like the padding token, so they change no address.

    Raises:
        ValueError: `vocabulary_size` is smaller than the tokenizer's, or there is no such padding token.
    """
    num_tokens = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
    size = num_tokens if vocabulary_size is None else vocabulary_size
    if size < num_tokens:
        raise ValueError(f"the model's vocabulary has {size} ids, fewer than the tokenizer's {num_tokens}")
    normalizer = _normalizer()
    keys = [_key(tokenizer, normalizer, token_id) for token_id in range(num_tokens)]
    pad_id = find_pad_id(tokenizer) if pad_id is None else pad_id
    pad_key = keys[pad_id] if 0 <= pad_id < num_tokens else None
    if pad_key is None:
        raise ValueError(f"pad_id {pad_id} is not a token of the tokenizer: choose one below {num_tokens}")

    compressed_ids: dict[str, int] = {}
    for key in keys:
        if key is not None:
            compressed_ids.setdefault(key, len(compressed_ids))
    mapped = [compressed_ids[pad_key if key is None else key] for key in keys + [None] * (size - num_tokens)]
    return CompressedVocabulary(torch.tensor(mapped), len(compressed_ids), compressed_ids[pad_key])


def identity_vocabulary(vocabulary_size: int, *, pad_id: int) -> CompressedVocabulary:
    """No compression: every token id stands for itself.

    Raises:
        ValueError: the padding token is outside the vocabulary.
    """
    if not 0 <= pad_id < vocabulary_size:
        raise ValueError(f"pad_id {pad_id} is outside the vocabulary of {vocabulary_size} ids")
    return CompressedVocabulary(torch.arange(vocabulary_size), vocabulary_size, pad_id)


def find_pad_id(tokenizer: Tokenizer) -> int:
    """Raw id of the token that is used where an n-gram reaches back beyond its document.

    That is the padding token the tokenizer states, else a token with such a name (`<pad>`, `[PAD]`, `<|▁pad▁|>`), else
    its first special token, which in tokenizers without padding marks the border of a document.

    Raises:
        ValueError: there is none of these.
    """
    if tokenizer.padding is not None:
        return tokenizer.padding["pad_id"]
    added = sorted(tokenizer.get_added_tokens_decoder().items())
    named = [i for i, token in added if "".join(filter(str.isalpha, token.content)).lower() in ("pad", "padding")]
    special = [i for i, token in added if token.special]
    for candidates in (named, special):
        if candidates:
            return candidates[0]
    raise ValueError("the tokenizer has no special token to pad n-grams with: set model.engram.pad_id to a token id")


def _normalizer() -> normalizers.Normalizer:
    return normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
            normalizers.Replace(Regex(r"^ $"), _LONE_SPACE),
            normalizers.Strip(),
            normalizers.Replace(_LONE_SPACE, " "),
        ]
    )


def _key(tokenizer: Tokenizer, normalizer: normalizers.Normalizer, token_id: int) -> str | None:
    token = tokenizer.id_to_token(token_id)
    if token is None:
        return None  # a gap in the ids
    text = tokenizer.decode([token_id], skip_special_tokens=False)
    if _NO_TEXT in text:
        return token
    return normalizer.normalize_str(text) or text
