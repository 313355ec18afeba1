import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from tests.train.data.text import deepseek
from train.data.tokenization.cuts import continuing, cuts_of, longest_part, parts
from train.data.tokenization.pattern import UnknownPattern, matches_of

CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PIECES = [
    *("the", "The", "lazy dogs", " ", "  ", " " * 40, "\t", "\n", "\r\n", "\n\n  ", ",", ".", "...", "'s", "'LL", "'"),
    *("1", "12345", "٣", "Ⅻ", "é", "e\u0301", "\u0301", "ſ", "ß", "SS", "ﬁ", "İ", "Σς", "▁", "_", "\u200b", "\x00"),
    *("中文", "，", "。", "ひらがな", "한글", "\u1112\u1161\u11ab", "\u00a0", "\u2028", "\x85", "\ufe0f"),
    *("👩\u200d👩\u200d👧", "🇩🇪", "<tool>", "<|endoftext|>", "</s>", "a b"),
]
HOSTILE = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=12).map("".join),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
)
SAMPLE = ["The lazy dog's 12,345 dogs.\n  It's 中文，ひらがな。 " * 4, *(a + b for a in PIECES for b in PIECES)]


def split(pattern, behavior="isolated"):
    return pre_tokenizers.Split(Regex(pattern), behavior)


def byte_level(*before, use_regex=False, prefix=False):
    last = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=use_regex)
    return pre_tokenizers.Sequence([*before, last]) if before else last


def backend(pre_tokenizer, normalizer=None, kind="bpe", added=(), trained=None):
    """A tokenizer whose tokens would reach over any place of a text, if its pre-tokenizer let them."""
    bytes_alone = "ByteLevel" in repr(pre_tokenizer)
    model = {
        "bpe": lambda: models.BPE(unk_token="<unk>", ignore_merges=True),  # what it merges tells nothing
        "unigram": models.Unigram,
        "wordpiece": lambda: models.WordPiece(unk_token="<unk>"),
    }
    made = Tokenizer(model[kind]())
    if bytes_alone or trained:
        made.pre_tokenizer = trained or byte_level()
    trainer = {"bpe": trainers.BpeTrainer, "unigram": trainers.UnigramTrainer, "wordpiece": trainers.WordPieceTrainer}
    alphabet = pre_tokenizers.ByteLevel.alphabet() if bytes_alone else []
    options = {"unk_token": "<unk>"} if kind == "unigram" else {}
    made.train_from_iterator(
        SAMPLE, trainer[kind](vocab_size=700, special_tokens=["<unk>", "<|endoftext|>"], initial_alphabet=alphabet,
                              show_progress=False, **options)
    )  # fmt: skip
    made.pre_tokenizer = pre_tokenizer
    made.normalizer = normalizer
    made.add_tokens(list(added))
    made.encode_special_tokens = True
    return made


def sentencepiece(pre_tokenizer, normalizer=None, **options):
    """A BPE of words that begin with ▁, behind no pre-tokenizer that would cut them, with bytes for what it has not."""
    words = backend(P.Metaspace(), trained=P.Metaspace())
    description = json.loads(words.to_str())
    places = range(len(description["model"]["vocab"]), 1 << 30)
    in_bytes = {f"<0x{byte:02X}>": place for byte, place in zip(range(256), places, strict=False)}
    description["model"] |= {"byte_fallback": True, "fuse_unk": True, "ignore_merges": False} | options
    description["model"]["vocab"] |= in_bytes
    made = Tokenizer.from_str(json.dumps(description))
    made.pre_tokenizer, made.normalizer, made.encode_special_tokens = pre_tokenizer, normalizer, True
    return made


N, P = normalizers, pre_tokenizers
BACKENDS = {
    "GPT-2": lambda: backend(byte_level(use_regex=True)),
    "GPT-2 with a space before": lambda: backend(byte_level(use_regex=True, prefix=True)),
    "GPT-4": lambda: backend(byte_level(split(CL100K))),
    "GPT-4o": lambda: backend(byte_level(split(O200K)), added=["<tool>", "a b", ".."]),
    "Qwen 2": lambda: backend(byte_level(split(CL100K.replace("{1,3}", ""))), N.NFC()),
    "DeepSeek": lambda: deepseek().backend,
    "Llama 2 with pieces": lambda: backend(P.Metaspace()),
    "T5 without its map": lambda: backend(
        P.Sequence([P.WhitespaceSplit(), P.Metaspace(prepend_scheme="first")]), kind="unigram"
    ),
    "pieces, cut before and after": lambda: backend(
        P.Sequence([P.Digits(True), P.Metaspace(prepend_scheme="first", split=False), split(" |[.,]")]), kind="unigram"
    ),
    "NFKD and strings": lambda: backend(
        P.Sequence([P.Split(" t", "isolated"), P.Split(" ", "removed")]),
        N.Sequence([N.NFKD(), N.Replace("_", " ")]),
        added=["a_b"],
    ),
    "BERT": lambda: backend(P.BertPreTokenizer(), N.BertNormalizer(), kind="wordpiece"),
    "words and digits": lambda: backend(P.Sequence([P.Whitespace(), P.Digits(True), byte_level(prefix=True)])),
    "runs of digits": lambda: backend(
        P.Sequence([P.WhitespaceSplit(), P.Punctuation("isolated"), P.Metaspace(split=False), P.Digits(False)])
    ),
    "a look ahead": lambda: backend(byte_level(split(r"a(?=b)|\s(?![.])|(?i:the)+?|(?i:sst)|[^a]"))),
    "Llama 2": lambda: sentencepiece(None, N.Sequence([N.Prepend("▁"), N.Replace(" ", "▁")])),
    "Llama 2 without bytes": lambda: sentencepiece(
        P.Metaspace(prepend_scheme="first", split=False), byte_fallback=False
    ),
    "Gemma": lambda: sentencepiece(P.Split(" ", "merged_with_previous"), N.Replace(" ", "▁")),
    "matches with what is beside them": lambda: sentencepiece(
        P.Sequence(
            [split(r"\d+", "merged_with_next"), split("[.,]", "merged_with_previous"), split("[▁中]", "contiguous")]
        ),
        N.Replace(" ", "▁"),
    ),
    "two of a kind": lambda: backend(byte_level(split(r"[45t]{2}|(?!1)[1٣]|[\s，]|_?+_|\.{1,2}?,"))),
}  # fmt: skip


@pytest.fixture(scope="module", params=BACKENDS)
def made(request):
    return BACKENDS[request.param]()


def told(made, text, words=0):
    """Its tokens, and the word that each is of, unless the model alone tells where to cut."""
    encoding = made.encode(text, add_special_tokens=False)
    by_words = getattr(made.model, "ignore_merges", True)
    return [(token, by_words and word + words) for token, word in zip(encoding.ids, encoding.word_ids, strict=True)]


def test_tokens_and_words_on_both_sides_of_every_place_for_a_cut_are_those_of_the_whole(made):
    may_cut, behind = cuts_of(made), continuing(made)

    @settings(max_examples=150, deadline=None)
    @given(HOSTILE)
    @example("ßthe")
    def holds(text):
        whole = told(made, text)
        for place in range(1, len(text)):
            if may_cut(text[place - 1], text[place]):
                left = told(made, text[:place])
                words = max((word for _, word in left), default=-1) + 1
                assert left + told(behind, text[place:], words) == whole, place

    holds()


FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")
ENGLISH, CHINESE = "The lazy dogs, 3 of them,\nsaid: it's late. ", "中文，没有空格的文字。ひらがな，"


def test_text_is_cut_about_where_asked_and_nothing_is_lost(made):
    may_cut = cuts_of(made)
    for text in (ENGLISH, CHINESE):
        cut = list(parts(text * 40, may_cut, 100))
        assert "".join(part.text for part in cut) == text * 40
        assert [part.first for part in cut] == [True] + [False] * (len(cut) - 1)
        assert [part.last for part in cut] == [False] * (len(cut) - 1) + [True]
        assert longest_part(text * 40, may_cut, 100) == max(len(part.text) for part in cut)
        # Of what a normalizer does beyond ASCII nothing is known, and some need a space.
        needs_space = made.normalizer or "Metaspace" in repr(made.pre_tokenizer) or "space=True" in repr(made)
        if text is ENGLISH or not needs_space:
            assert all(100 <= len(part.text) < 130 for part in cut[:-1])
            assert len(cut) > 5


def test_a_text_without_a_place_for_a_cut_stays_whole():
    may_cut = cuts_of(BACKENDS["GPT-2"]())
    assert list(parts("a" * 1000, may_cut, 10)) == [("a" * 1000, True, True)]
    assert list(parts("a" * 10, may_cut, 10)) == [("a" * 10, True, True)]
    assert list(parts("", may_cut, 10)) == []
    assert (longest_part("a" * 1000, may_cut, 10), longest_part("", may_cut, 10)) == (1000, 0)
    assert longest_part("of one that needs it whole", None, 5) == 26


def test_nothing_is_put_before_a_part_that_is_not_the_first():
    llama, gpt2 = BACKENDS["Llama 2"](), BACKENDS["GPT-2"]()
    assert continuing(gpt2) is gpt2
    assert llama.encode("the dogs").tokens[0] == "▁the"
    assert continuing(llama).encode("the dogs").tokens == ["the", *llama.encode("the dogs").tokens[1:]]


def test_what_a_model_sees_of_a_character_may_be_merged_with_what_is_beside_it():
    tokens = ["<0xC3>", "<0xA9>", "a", "b", " ", "▁", "a<0xC3>", "<0xA9>a", "▁b"]
    vocab = {token: number for number, token in enumerate(tokens)}
    made = Tokenizer(models.BPE(vocab, [("a", "<0xC3>"), ("<0xA9>", "a"), ("▁", "b")], byte_fallback=True))
    made.pre_tokenizer = P.Metaspace(prepend_scheme="never", split=False)
    assert made.encode("aéa b").tokens == ["a<0xC3>", "<0xA9>a", "▁b"]
    may_cut = cuts_of(made)
    assert [may_cut(*pair) for pair in ("aé", "éa", " b", "a ", "ab")] == [False, False, False, True, True]


def test_a_letter_may_become_another_by_the_mark_behind_it():
    made = Tokenizer(models.BPE({"A": 0, "a": 1, "=": 2, " ": 3, "A ": 4}, [("A", " ")]))
    for normalizer in N.NFC(), N.NFKC():
        made.normalizer = normalizer
        assert made.encode("Aa\u0301 ").tokens == ["A "], "what the vocabulary has not is left out"
        assert [cuts_of(made)(*pair) for pair in ("Aa", "A=", "a ", "==")] == [False, False, True, False]


def test_a_match_is_not_cut_off_from_what_it_is_joined_to():
    made = Tokenizer(models.BPE({"a": 0, ".": 1, "a.": 2}, [("a", ".")]))
    made.pre_tokenizer = split("[.]", "merged_with_previous")
    assert made.encode("a.").tokens == ["a."]
    assert [cuts_of(made)(*pair) for pair in ("a.", "..", ".a")] == [False, True, True]


def test_what_comes_after_bytes_tells_nothing():
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = P.Sequence([byte_level(), P.Split(" ", "isolated")])
    assert made.pre_tokenizer.pre_tokenize_str("a b") == [("aĠb", (0, 3))]
    assert not cuts_of(made)("a", " ")


@pytest.mark.parametrize(
    "change",
    [
        {"pre_tokenizer": None},
        {"pre_tokenizer": None, "model": {"ignore_merges": False, "end_of_word_suffix": "</w>"}},
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(?<=a) "}, "behavior": "Isolated", "invert": False}},
        {"pre_tokenizer": {"type": "UnicodeScripts"}},
        {"pre_tokenizer": {"type": "FixedLength", "length": 4}},
        {"pre_tokenizer": {"type": "Punctuation", "behavior": "MergedWithNext"}},
        {
            "normalizer": {"type": "Prepend", "prepend": "▁"},
            "added_tokens": [{"id": 2, "content": "x", **dict.fromkeys(FLAGS, False)}],
        },
        {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}},
        {"normalizer": {"type": "Replace", "pattern": {"String": "a "}, "content": "b"}},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": " +"}, "content": " "}},
        *(
            {"added_tokens": [{"id": 2, "content": "x", **dict.fromkeys(FLAGS, False), flag: True}]}
            for flag in ("lstrip", "rstrip", "single_word")
        ),
        {"model": {"dropout": 0.1}},
    ],
    ids=lambda change: json.dumps(change)[:60],
)
def test_no_cut_where_text_far_off_may_matter(change):
    description = json.loads(BACKENDS["GPT-2"]().to_str())
    whole = {**description, **change, "model": {**description["model"], **change.get("model", {})}}
    assert cuts_of(Tokenizer.from_str(json.dumps(description)))
    assert cuts_of(Tokenizer.from_str(json.dumps(whole))) is None


@pytest.mark.parametrize(
    "pattern",
    [
        *(r"a*", r"a|", r"(?=a)", r"\bx", r"^a", r"a$", r"a\z", r"\Ga", r"(?<=a)b", r"(?<!a)b", r"(?!ab)c", r"(?=a+)c"),
        *(
            r"(a)\1",
            r"\Ra",
            r"\Xa",
            r"(?i)a",
            r"(?i:ß)",
            r"(?i:[^a])",
            r"(?i:\w)",
            r"(?i:\x{df})",
            r"(?i:[[:alpha:]])",
            r"(?x:a)",
            r"(?>a)",
        ),
        *(r"[a", r"(a", r"a)", r"a{", r"a{2}?", r"*a", r"a\x{61 62}"),
    ],
)
def test_patterns_of_which_something_is_not_known_are_refused(pattern):
    with pytest.raises(UnknownPattern):
        matches_of(pattern)
