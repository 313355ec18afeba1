"""A checkpoint gives back what was saved, or says that it does not."""

import gc
import json
import re
import shutil
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import train.checkpoint.parts
from tests.train.checkpoint.small import APPLIED, fault, records, write
from train.checkpoint.checked import Damaged, checked_text
from train.checkpoint.index import Index, Save
from train.checkpoint.manifest import Manifest
from train.checkpoint.open import open_image
from train.checkpoint.part_reader import PartReader
from train.checkpoint.parts import PartWriter, write_synced
from train.checkpoint.saved_image import SavedRows, check_rows, find_rows
from train.checkpoint.saved_weights import SavedWeights
from train.errors import UserError


def test_an_image_takes_little_memory_for_each_of_many_pieces(tmp_path: Path) -> None:
    path, count = write(tmp_path), 4000
    index, _ = Index.read(path / "rank-00001.json")
    first = index.rows[0]
    index.rows[:] = [replace(first, first=10 * n + 10, last=10 * n + 15) for n in range(count)]
    text, found = index.text()
    (path / "rank-00001.json").write_bytes(text)
    manifest, _ = Manifest.read(path)
    ranks = [manifest.ranks[0], replace(manifest.ranks[1], index_sum=found, rows=count * first.count)]
    manifest = replace(manifest, ranks=ranks, addresses={"primes": [[10 * count + 20]]})
    (path / "manifest.json").write_bytes(manifest.text())
    tracemalloc.start()
    image = open_image(path)
    gc.collect()
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(image.spans) == 1 + count
    assert image.spans[count] == index.rows[-1]
    assert held < 100 * count + (64 << 10)


def test_what_was_saved_is_read_back(tmp_path: Path) -> None:
    image = open_image(write(tmp_path))
    assert fault(image.path) is None
    weights = SavedWeights(image)
    assert torch.equal(weights["a"], torch.arange(10.0).view(2, 5) + 4)
    assert weights["calls"].tolist() == [4, 2]
    assert [piece.start for piece in image.pieces(lambda name, start, count: start == 5)] == [5]
    assert [image.rows(span).ids_N.tolist() for span in image.spans] == [[1, 4, 5], [11, 14, 15]]
    out = torch.zeros(4, 3)
    assert find_rows(image, torch.tensor([0, 4, 11, 15]), out).tolist() == [False, True, True, True]
    assert torch.equal(out[1:], records([1, 4, APPLIED])[[1, 0, 2]])


def test_any_program_can_read_the_files(tmp_path: Path) -> None:
    tensors = load_file(write(tmp_path) / "rank-00001-000000.safetensors")
    assert tensors["weight/a@5"].tolist() == [9, 10, 11, 12, 13]
    assert tensors["ids@11"].tolist() == [11, 14, 15]


def test_files_and_pieces_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.checkpoint.parts, "FILE_BYTES", 100)
    with PartWriter(tmp_path, Save(1, "n", 0, 1)) as writer:
        for start in range(0, 50, 10):
            writer.add("weight/a", start, torch.arange(10.0) + start)
        writer.finish()
    index, _ = Index.read(tmp_path / "rank-00000.json")
    assert [piece.file[-18:-12] for piece in index.ranges] == ["000000", "000000", "000001", "000001", "000002"]
    for file in index.files:
        assert sum(t.nbytes for t in load_file(tmp_path / file.name).values()) <= 100


def test_a_file_that_cannot_be_made_ends_a_save_of_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.checkpoint.parts, "FILE_BYTES", 16)

    def save() -> None:
        with PartWriter(tmp_path / "gone", Save(4, "0a", 0, 1)) as writer:
            for start in range(0, 24, 4):
                writer.add("weight/a", start, torch.ones(4))

    with pytest.raises(OSError, match=r"gone/rank-00000-000000\.safetensors"):
        save()


def test_an_index_that_does_not_fit_is_named() -> None:
    with pytest.raises(OSError, match="/dev/full"):
        write_synced(Path("/dev/full"), [b"text"])


def test_every_flipped_byte_in_every_file_is_found(tmp_path: Path) -> None:
    path = write(tmp_path)
    files = sorted(path.iterdir())
    assert len(files) == 5
    for file in files:
        data = bytearray(file.read_bytes())
        for place in range(len(data)):
            data[place] ^= 0x20
            file.write_bytes(data)
            assert fault(path) is not None, (file.name, place)
            data[place] ^= 0x20
        file.write_bytes(data)
    assert fault(path) is None


def test_every_file_that_is_cut_short_or_longer_or_missing_is_found(tmp_path: Path) -> None:
    path = write(tmp_path)
    for file in sorted(path.iterdir()):
        data = file.read_bytes()
        for end in (0, 1, 8, len(data) // 2, len(data) - 1):
            file.write_bytes(data[:end])
            assert fault(path) is not None, (file.name, end)
        file.write_bytes(data + b"\n")
        assert fault(path) is not None, file.name
        if file.name != "manifest.json":  # without it, the folder is no checkpoint
            file.unlink()
            assert fault(path) == f"{file.name} is missing"
        file.write_bytes(data)


def swapped(name: str) -> Callable[[Path, Path], None]:
    return lambda path, other: shutil.copy(other / name, path / name)


PART = "rank-00001-000000.safetensors"
SWAPS = {
    "a file of another step": (swapped(PART), f"{PART} is of another save: step 6, nonce 0b"),
    "an index of another step": (swapped("rank-00001.json"), "rank-00001.json is of another save (step 6, rank 1)"),
    "a file of another rank": (
        lambda path, _: shutil.copy(path / PART.replace("1", "0", 1), path / PART),
        f"{PART} has ",
    ),
    "an index of another rank": (
        lambda path, _: shutil.copy(path / "rank-00000.json", path / "rank-00001.json"),
        "rank-00001.json is of another save (step 4, rank 0)",
    ),
}


@pytest.mark.parametrize("swap", SWAPS)
def test_a_file_of_another_save_or_rank_is_told(swap: str, tmp_path: Path) -> None:
    path, other = write(tmp_path), write(tmp_path, step=6, nonce="0b")
    change, message = SWAPS[swap]
    change(path, other)
    assert str(fault(path)).startswith(message)


WRONG = {
    "a tensor without pieces": (
        {"tensors": {"weight/a": ("F32", [2, 5]), "buffer/calls": ("I64", [2]), "weight/b": ("F32", [1])}},
        "0 of 1 elements of weight/b",
    ),
    "pieces of no tensor": (
        {"tensors": {"weight/a": ("F32", [2, 5])}},
        "pieces of buffer/calls, which is not one of its tensors",
    ),
    "a larger tensor": (
        {"tensors": {"weight/a": ("F32", [11]), "buffer/calls": ("I64", [2])}},
        "10 of 11 elements of weight/a",
    ),
    "a smaller table": ({"addresses": {"primes": [[7, 8]]}}, "row 15 of 15"),
    "fewer updates": ({"tables": {"settings": {}, "learning_rates": [0.1] * 4}}, "rows with an update that never was"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_parts_that_do_not_fit_each_other_are_told(wrong: str, tmp_path: Path) -> None:
    changes, message = WRONG[wrong]
    assert re.search(re.escape(message), str(fault(write(tmp_path, **changes))))


def written_rows(path: Path, ids: list[int], versions: list[int]) -> str | None:
    """What is wrong with a checkpoint whose one rank wrote these rows, checksums and all."""
    path.mkdir()
    with PartWriter(path, Save(1, "n", 0, 1)) as writer:
        for part in zip(torch.tensor(ids).split(3), records(versions).split(3), strict=True):
            writer.add_rows(*part)
        written = writer.finish()
    values = {key: {} for key in ("model", "addresses", "data", "tensors")} | {"addresses": {"primes": [[20]]}}
    tables = {"settings": {}, "learning_rates": [0.1] * APPLIED}
    manifest = Manifest(1, 1, "n", 1, 0, **values, tokenizer="", data_changes=[], tables=tables, ranks=[written])
    (path / "manifest.json").write_bytes(manifest.text())
    return fault(path)


def test_rows_out_of_order_twice_out_of_range_or_never_updated_are_told(tmp_path: Path) -> None:
    assert written_rows(tmp_path / "good", [1, 2, 3, 7], [1, 1, 2, 5]) is None
    assert "do not ascend" in str(written_rows(tmp_path / "order", [1, 3, 2], [1, 1, 1]))
    assert "do not ascend" in str(written_rows(tmp_path / "twice", [1, 2, 2], [1, 1, 1]))
    assert "row 3 is there twice" in str(written_rows(tmp_path / "again", [1, 2, 3, 3], [1, 1, 1, 1]))
    assert "row 20 of 20" in str(written_rows(tmp_path / "range", [1, 20], [1, 1]))
    assert "an update that never was" in str(written_rows(tmp_path / "fresh", [1, 2], [1, 0]))


def test_update_counts_are_saved_and_may_be_missing_as_before_format_4(tmp_path: Path) -> None:
    ids, counts = torch.tensor([1, 4]), torch.tensor([1, 255], dtype=torch.uint8)
    with PartWriter(tmp_path, Save(1, "0a", 0, 1)) as writer:
        writer.add_rows(ids, records([1, 1]), counts)
        writer.finish()
    path = tmp_path / "rank-00000.json"
    index, _ = Index.read(path)
    (span,) = index.rows
    found = PartReader(tmp_path, {index.save: index.files}).read(span.file, span.counts_name, span.counts_sum)
    assert torch.equal(found, counts)
    check_rows(span, SavedRows(ids, records([1, 1]), counts), applied=1)
    with pytest.raises(Damaged, match="rows without an update"):
        check_rows(span, SavedRows(ids, records([1, 1]), counts - 1), applied=1)
    values = json.loads(path.read_bytes())
    values.pop("xxh3_64")
    values["rows"][0].pop(5)
    path.write_bytes(checked_text(values)[0])
    assert Index.read(path)[0].rows == [replace(span, counts_sum="")]


def test_a_later_format_is_told(tmp_path: Path) -> None:
    path = write(tmp_path, format=5)
    with pytest.raises(UserError, match="has format 5, this version reads 1 to 4"):
        open_image(path)


def test_what_is_mapped_was_verified_before(tmp_path: Path) -> None:
    path = write(tmp_path)
    image = open_image(path)
    file = path / image.spans[0].file
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(Damaged, match=r"the checksum of records@1 differs"):
        find_rows(image, torch.tensor([1]), torch.zeros(1, 3))


def test_tokens_that_were_not_saved_are_those_of_as_many_batches(tmp_path: Path) -> None:
    def config(batch: int) -> dict[str, Any]:
        return {"train": {"global_batch_size": batch}, "data": {"sequence_length": 32}}

    for changes, tokens in (
        ({}, 4 * 6 * 32),
        ({"config": config(8)}, 4 * 8 * 32),
        ({"config": config(8), "tokens": 7}, 7),
    ):
        manifest, _ = Manifest.read(write(tmp_path / str(tokens), **changes))
        assert manifest.tokens_seen(config(6)) == tokens
