import gzip
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from train.data.preparation import readers
from train.data.preparation.readers import Bad, reader_of


def read(path, key="text", chars=1 << 18):
    return [record for record, _ in reader_of(path)(path, key, chars)]


def bad_places(records):
    return [record.where.rsplit("/", 1)[-1] for record in records if isinstance(record, Bad)]


LINES = [
    json.dumps({"text": "one", "id": 1}),
    "{broken",
    "",
    json.dumps({"body": "no text"}),
    json.dumps({"text": 5}),
    json.dumps(["text"]),
    '{"text": "\\ud83d"}',
    json.dumps({"text": "größer 🙂"}),
]
CONTENT = "\n".join(LINES).encode()


def two_frames(content: bytes) -> bytes:
    middle = content.index(b"\n") + 1
    return b"".join(zstandard.compress(part) for part in (content[:middle], content[middle:]))


@pytest.mark.parametrize(("suffix", "pack"), [("jsonl", bytes), ("jsonl.gz", gzip.compress), ("jsonl.zst", two_frames)])
def test_json_lines(tmp_path, suffix, pack):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(pack(CONTENT))
    records = read(path)
    assert [record for record in records if isinstance(record, str)] == ["one", "größer 🙂"]
    assert bad_places(records) == [f"a.{suffix}:{line}" for line in (2, 4, 5, 6, 7)]
    assert "its fields: body" in records[2].why


def test_other_field(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(CONTENT)
    assert read(path, "body")[2] == "no text"


def test_bytes_that_are_not_utf8_are_a_bad_line_not_a_bad_file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "\xff"}\n{"text": "ok"}\n')
    records = read(path)
    assert bad_places(records) == ["a.jsonl:1"]
    assert records[1] == "ok"


@pytest.mark.parametrize(("suffix", "pack"), [("gz", gzip.compress), ("zst", zstandard.compress)])
def test_damaged_compression_ends_the_file_and_is_told(tmp_path, suffix, pack):
    path = tmp_path / f"a.jsonl.{suffix}"
    lines = "\n".join(json.dumps({"text": str(i) * 50}) for i in range(5000)).encode()
    packed = bytearray(pack(lines))
    packed[len(packed) // 2 : len(packed) // 2 + 40] = b"\xff" * 40
    path.write_bytes(packed)
    assert isinstance(read(path)[-1], Bad)
    path.write_bytes(b"not compressed at all")
    assert bad_places(read(path)) == [f"a.jsonl.{suffix}:1"]


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress, two_frames])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "A.JSONL"])
def test_compression_that_is_cut_short_is_told_wherever_it_ends(tmp_path, pack, name):
    packed = pack(CONTENT)
    path = tmp_path / f"{name}.{'gz' if pack is gzip.compress else 'zst'}"
    path.write_bytes(packed)
    assert "größer 🙂" in read(path)
    # Two frames cut between them are a whole file of one.
    for end in {0, 3, len(packed) // 2, len(packed) - 5, len(packed) - 1}:
        path.write_bytes(packed[:end])
        assert isinstance(read(path)[-1], Bad), end


def test_a_frame_that_becomes_far_more_is_read_whole(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstandard.compress(json.dumps({"text": "a" * 3_000_000}).encode()))
    assert [len(text) for text in read(path)] == [3_000_000]


def test_a_line_that_is_too_long_is_a_bad_place_and_the_next_one_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST_LINE", 60)
    monkeypatch.setattr(readers, "_LINE_PIECE", 25)
    path = tmp_path / "a.jsonl"
    texts = ["x" * length for length in (3, 40, 47, 48, 300)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, "last"]))
    records = read(path)
    assert [record for record in records if isinstance(record, str)] == ["xxx", "x" * 40, "x" * 47, "last"]
    assert bad_places(records) == ["a.jsonl:4", "a.jsonl:5"]


def test_a_parquet_cell_that_cannot_be_read_is_a_bad_place(tmp_path):
    path = tmp_path / "a.parquet"
    ends = pyarrow.py_buffer(np.array([0, 2, 4, 6], dtype=np.int32))
    texts = pyarrow.Array.from_buffers(pyarrow.string(), 3, [None, ends, pyarrow.py_buffer(b"ok\xff\xfeto")])
    dates = pyarrow.array([0, 0, 2**62], pyarrow.timestamp("us"))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "when": dates}), path)
    records = read(path)
    assert (records[0], records[2], bad_places(records)) == ("ok", "to", ["a.parquet:2"])
    assert "not UTF-8" in records[1].why
    assert bad_places(read(path, "when")) == ["a.parquet:1", "a.parquet:2", "a.parquet:3"]


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    texts = [f"row {i}" for i in range(600)]
    texts[300] = None
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "n": list(range(600))}), path, row_group_size=250)
    records = read(path)
    assert bad_places(records) == ["a.parquet:301"]
    assert [record for record in records if isinstance(record, str)] == [text for text in texts if text]
    assert "its columns: text, n" in read(path, "txt")[0].why
    assert len(bad_places(read(path, "n"))) == 600
    path.write_bytes(b"PAR1 nonsense PAR1")
    assert len(bad_places(read(path))) == 1


def test_of_a_parquet_row_group_no_more_is_in_memory_than_rows_that_are_read_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_ROWS_BYTES", 1 << 20)
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": ["x" * (1 << 19)] * 24})
    pyarrow.parquet.write_table(table, path, compression="none", use_dictionary=False, write_batch_size=1)
    del table
    before = pyarrow.total_allocated_bytes()
    for record, _ in reader_of(path)(path, "text", 9):
        assert len(record) == 1 << 19
        assert pyarrow.total_allocated_bytes() - before < 6 << 20


def test_position_reaches_the_files_size(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"]}), path)
    assert list(reader_of(path)(path, "text", 9))[-1][1] == path.stat().st_size


@given(st.text(st.sampled_from("ab \n\r🙂"), max_size=200), st.integers(1, 40))
def test_long_text_is_cut_without_loss_and_within_the_limit(tmp_path_factory, text, limit):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes(text.encode())
    pieces = read(path, chars=limit)
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= limit for piece in pieces) or pieces == [""]
    for piece in pieces[:-1]:
        assert piece.endswith("\n") or "\n" not in piece


def test_text_that_cannot_be_decoded_gives_nothing_but_a_bad_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"good line\n" * 100 + b"\xff\xfe")
    assert bad_places(read(path, chars=50)) == ["a.txt"]
    assert len(read(path, chars=50)) == 1


def test_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "A.TXT"
    path.write_bytes(b"\xef\xbb\xbfhello")
    assert read(path) == ["hello"]
