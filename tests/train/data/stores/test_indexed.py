"""The format is held against a reader and a writer of their own, made of `struct` alone."""

import io
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.data.stores.indexed import DTYPES, read_index, token_dtype, write_index
from train.errors import UserError

CODES = {"uint16": 8, "int32": 4}


def reference_index(code: int, itemsize: int, lengths: list[int], documents: list[int]) -> bytes:
    pointers = [itemsize * sum(lengths[:i]) for i in range(len(lengths))]
    parts = [b"MMIDIDX\x00\x00", struct.pack("<Q", 1), struct.pack("<B", code)]
    parts += [struct.pack("<QQ", len(lengths), len(documents)), struct.pack(f"<{len(lengths)}i", *lengths)]
    parts += [struct.pack(f"<{len(pointers)}q", *pointers), struct.pack(f"<{len(documents)}q", *documents)]
    return b"".join(parts)


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=30), st.sampled_from(["uint16", "int32"]))
def test_written_bytes_are_the_references(lengths, kind):
    stream = io.BytesIO()
    write_index(stream, np.dtype(kind), np.array(lengths, dtype=np.int32))
    itemsize = np.dtype(kind).itemsize
    assert stream.getvalue() == reference_index(CODES[kind], itemsize, lengths, list(range(len(lengths) + 1)))


@given(st.data(), st.sampled_from(sorted(DTYPES)))
def test_reads_what_the_reference_writes_also_documents_of_several_sequences(tmp_path_factory, data, code):
    lengths = data.draw(st.lists(st.integers(0, 900), min_size=1, max_size=20))
    marks = sorted(data.draw(st.lists(st.integers(0, len(lengths)), max_size=5)))
    documents = [0, *marks, len(lengths)]
    itemsize = DTYPES[code].itemsize
    modes = b"\x01" * len(lengths) if data.draw(st.booleans()) else b""
    path = tmp_path_factory.mktemp("idx") / "a.idx"
    path.write_bytes(reference_index(code, itemsize, lengths, documents) + modes)
    index = read_index(path)
    assert index.dtype.itemsize == itemsize
    assert index.document_offsets().tolist() == [sum(lengths[:mark]) for mark in documents]


def test_offsets_beyond_32_bits():
    stream = io.BytesIO()
    lengths = np.full(5, 2**31 - 1, dtype=np.int32)
    write_index(stream, np.dtype("int32"), lengths)
    assert struct.unpack("<5q", stream.getvalue()[34 + 20 : 34 + 60])[4] == 4 * 4 * (2**31 - 1)


def test_type_follows_megatrons_rule():
    assert (token_dtype(65499), token_dtype(65500)) == (np.dtype("uint16"), np.dtype("int32"))


GOOD = reference_index(8, 2, [3, 4], [0, 1, 2])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not the index"),
        (GOOD[:20], "not the index"),
        (b"TNTIDX\x00\x00" + GOOD[8:], "not the index"),
        (GOOD[:9] + struct.pack("<Q", 2) + GOOD[17:], "version 2"),
        (GOOD[:17] + b"\x07" + GOOD[18:], "code 7"),
        (GOOD[:-1], "truncated"),
        (GOOD + b"\x00\x00\x00", "truncated"),
    ],
)
def test_damaged_files_are_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "a.idx"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_index(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("lengths", "documents", "swap", "message"),
    [([3, 4], [0, 1, 2], True, "contiguous"), ([3, 4], [0, 2, 1, 2], False, "order"), ([3, 4], [0, 1], False, "order")],
)
def test_inconsistent_contents_are_refused(tmp_path, lengths, documents, swap, message):
    path = tmp_path / "a.idx"
    content = bytearray(reference_index(8, 2, lengths, documents))
    if swap:
        content[34 + 8 + 8] += 2
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_index(path).document_offsets()
