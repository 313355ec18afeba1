import json
import struct

import numpy as np
import pytest

from tests.train.data.text import SENTENCES, deepseek, document, small_tokenizer, write_pair
from train.data.preparation.prepare import prepare
from train.data.stores.store import TokenStore
from train.errors import UserError

TOKENIZER = small_tokenizer()


@pytest.fixture
def folder(tmp_path):
    source = tmp_path / "text"
    source.mkdir()
    for i, text in enumerate(SENTENCES):
        (source / f"{i:03}.txt").write_text(text)
    prepare([source], tmp_path / "out", tokenizer=TOKENIZER, progress=False)
    return tmp_path / "out"


def refused(message, path, **kwargs):
    with pytest.raises(UserError, match=message) as caught:
        TokenStore.open(path, **kwargs)
    assert "\n" not in str(caught.value)


def test_documents_are_the_texts_each_closed(folder):
    store = TokenStore.open(folder)
    assert store.num_documents == len(SENTENCES)
    for i, text in enumerate(SENTENCES):
        assert document(store, i)[-1] == store.eos_id
        assert store.tokenizer().decode(document(store, i)) == text
    assert store.tokens.dtype == np.uint16
    assert store.bytes_of(store.tokens.astype(np.int64)) == sum(len(text.encode()) for text in SENTENCES)


def test_bytes_skip_ignored_labels(folder):
    store = TokenStore.open(folder)
    ids = np.array(store.tokenizer().encode("the fox"))
    assert store.bytes_of(np.array([[-100, *ids], [-100] * (len(ids) + 1)])) == 7


def test_tokens_are_read_only(folder):
    with pytest.raises(ValueError, match="read-only"):
        TokenStore.open(folder).tokens[0] = 1


def test_megatron_reader_made_of_struct_reads_what_prepare_wrote(folder):
    index, tokens = (folder / "tokens.idx").read_bytes(), (folder / "tokens.bin").read_bytes()
    magic, version, code, count, marks = struct.unpack_from("<9sQBQQ", index)
    assert (magic, version, code, marks) == (b"MMIDIDX\x00\x00", 1, 8, count + 1)
    lengths = struct.unpack_from(f"<{count}i", index, 34)
    pointers = struct.unpack_from(f"<{count}q", index, 34 + 4 * count)
    documents = struct.unpack_from(f"<{marks}q", index, 34 + 12 * count)
    assert documents == tuple(range(count + 1))
    for i, text in enumerate(SENTENCES):
        ids = struct.unpack_from(f"<{lengths[i]}H", tokens, pointers[i])
        assert TOKENIZER.decode(ids) == text


def test_plain_pair_of_32_bit_tokens_with_documents_of_several_sequences(tmp_path):
    lengths, documents = [2, 3, 1], [0, 2, 3]
    (tmp_path / "a.bin").write_bytes(struct.pack("<6i", 5, 6, 7, 8, 0, 299))
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, 3, 3)
    index = struct.pack("<3i3q3q", *lengths, 0, 8, 20, *documents)
    (tmp_path / "a.idx").write_bytes(header + index)
    for name in ("a", "a.bin", "a.idx"):
        store = TokenStore.open(tmp_path / name, tokenizer=TOKENIZER)
        assert [document(store, i).tolist() for i in range(2)] == [[5, 6, 7, 8, 0], [299]]
    assert store.manifest is None
    refused("name the tokenizer", tmp_path / "a")


def test_fingerprint_of_a_plain_pair_follows_its_contents(tmp_path):
    one, two = (
        TokenStore.open(write_pair(tmp_path / name, [[5, token, 0]]), tokenizer=TOKENIZER)
        for name, token in (("a", 6), ("b", 7))
    )
    again = TokenStore.open(write_pair(tmp_path / "c", [[5, 6, 0]]), tokenizer=TOKENIZER)
    assert one.fingerprint == again.fingerprint != two.fingerprint


@pytest.mark.parametrize("name", ["tokens.bin", "tokens.idx"])
def test_changed_files_are_refused(folder, name):
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    refused("not what its manifest describes", folder)
    (folder / name).write_bytes(content[:-2])
    refused("not what its manifest describes", folder)
    (folder / name).unlink()
    refused("damaged", folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eos_id": 7}, "fingerprint does not follow"),
        ({"tokenizer_sha256": "0"}, "fingerprint does not follow"),
        ({"version": 2}, "version"),
        ({"surprise": 1}, "surprise"),
        ({"documents": -1}, "documents: Input should be greater than or equal to 0"),
        ({"tokens": 10**30}, "tokens: "),
        ({"tokens": "5"}, "tokens: Input should be a valid integer"),
        ({"vocab_size": 0}, "vocab_size: Input should be greater than or equal to 1"),
        ({"pad_id": 10**6}, "pad_id 1000000 is no id of a vocabulary of"),
    ],
)
def test_edited_manifests_are_refused(folder, change, message):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused(message, folder)


def test_another_tokenizer_is_refused(folder):
    other = small_tokenizer(290)
    refused("is not bpe-290", folder, tokenizer=other)
    assert TokenStore.open(folder, tokenizer=TOKENIZER).num_documents == len(SENTENCES)
    (folder / "tokenizer.json").write_text(other.json)
    with pytest.raises(UserError, match="not the tokenizer in the manifest"):
        TokenStore.open(folder).tokenizer()


def test_verify_finds_what_samples_miss(folder, monkeypatch):
    store = TokenStore.open(folder)
    store.verify()
    content = bytearray((folder / "tokens.bin").read_bytes())
    content[100] ^= 1
    (folder / "tokens.bin").write_bytes(content)
    with pytest.raises(UserError, match=r"tokens\.bin: damaged"):
        store.verify()


def test_wrong_places_are_refused_with_what_to_do(tmp_path, folder):
    refused("engram data prepare", tmp_path / "none")
    refused(f"engram data prepare {tmp_path}/text --out", tmp_path / "text")
    (folder / "manifest.json").write_text("{")
    refused("not JSON", folder)
    write_pair(tmp_path / "a", [[1, 0]])
    (tmp_path / "a.bin").write_bytes(b"\0\0")
    refused("truncated", tmp_path / "a", tokenizer=TOKENIZER)
    (tmp_path / "a.bin").unlink()
    refused("missing beside", tmp_path / "a", tokenizer=TOKENIZER)


def test_tokens_of_large_vocabularies_are_32_bit(tmp_path):
    (tmp_path / "a.txt").write_text("北京 is a city")
    prepare([tmp_path / "a.txt"], tmp_path / "out", tokenizer=deepseek(), progress=False)
    store = TokenStore.open(tmp_path / "out", tokenizer=deepseek())
    assert store.tokens.dtype == np.int32
    assert store.tokenizer().decode(document(store, 0)) == "北京 is a city"
    assert (store.eos_id, store.pad_id) == (1, 2)
