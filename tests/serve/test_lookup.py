"""What vLLM's plugin looks up, without vLLM: rows of n-grams, their values, and earlier tokens in a paged cache."""

import json
import mmap
import os
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from offload.addresses.compression import identity_vocabulary
from offload.addresses.hashing import AddressBook
from serve.vllm_engram.addresses import Addresses
from serve.vllm_engram.pages import earlier, keep, request_of
from serve.vllm_engram.tables import Table, Tables


@pytest.mark.parametrize("orders", [[2, 3], [1, 3, 4]])
def test_rows_are_those_of_training(orders: list[int]) -> None:
    book = AddressBook(identity_vocabulary(300, pad_id=2), layers=[0, 2], orders=orders, heads=2, rows_per_head=500)
    ids = torch.randint(300, (40,), generator=torch.Generator().manual_seed(1))
    numbers = book.fingerprint()
    padded = torch.cat([torch.full((max(orders) - 1,), numbers["pad_id"]), ids])
    looked_back = padded.unfold(0, max(orders), 1).flip(1)
    expected = book.all_rows(ids.unsqueeze(0), torch.arange(40).unsqueeze(0))[:, 0]
    assert torch.equal(torch.stack(Addresses(numbers)(looked_back)), expected)


@pytest.mark.parametrize("sizes", [[10], [4, 1, 5]])
def test_rows_of_a_batch_come_from_all_files(sizes: list[int], tmp_path: Path) -> None:
    values = torch.randn(10, 3)
    files = [tmp_path / f"{number}.safetensors" for number in range(len(sizes))]
    for file, part in zip(files, values.split(sizes), strict=True):
        save_file({"rows": part.contiguous()}, file)
    rows = torch.tensor([[0, 9], [3, 4], [4, 0]])
    (memory,) = Tables([Table(files)]).fetch([rows])
    assert torch.equal(memory.result(), values[rows].flatten(1))


def test_a_table_is_not_read_into_memory(tmp_path: Path) -> None:
    file, size = tmp_path / "rows.safetensors", 1 << 28
    entry = {"dtype": "F32", "shape": [size // 256, 64], "data_offsets": [0, size]}
    header = json.dumps({"rows": entry}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(file, 8 + len(header) + size)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    before = resident()
    table = Table([file])
    assert table(torch.arange(0, size // 256, 1 << 14).unsqueeze(1)).shape == (64, 64)
    assert resident() - before < size / 2  # pages around those that are read come along


def test_tokens_find_those_before_them_in_any_batches_and_blocks() -> None:
    draw = random.Random(2)
    size, distances, width = 4, [1, 2, 5], 2
    texts = [torch.randn(length, width) for length in (1, 7, 19, 30)]
    free = [*range(1, 40)]
    draw.shuffle(free)
    blocks = torch.zeros(len(texts), 8, dtype=torch.int32)
    for row, text in zip(blocks, texts, strict=True):
        row[: -(-len(text) // size)] = torch.tensor([free.pop() for _ in range(-(-len(text) // size))])
    cache, done = torch.full((40, size, width), float("nan")), [0] * len(texts)
    while left := [number for number, text in enumerate(texts) if done[number] < len(text)]:
        batch = draw.sample(left, draw.randint(1, len(left)))
        counts = [draw.randint(1, min(6, len(texts[number]) - done[number])) for number in batch]
        spans = [range(done[number], done[number] + count) for number, count in zip(batch, counts, strict=True)]
        positions = torch.tensor([position for span in spans for position in span])
        starts = torch.tensor([0, *counts]).cumsum(0)
        request = request_of(starts, len(positions))
        assert request.tolist() == [place for place, count in enumerate(counts) for _ in range(count)]
        table = blocks[batch]
        slots = table[request, positions // size].long() * size + positions % size
        new = torch.cat([texts[number][span.start : span.stop] for number, span in zip(batch, spans, strict=True)])
        keep(cache, new, slots)
        found = earlier(cache, positions, request, table, distances, -1.0)
        for values, position, place in zip(found, positions.tolist(), request.tolist(), strict=True):
            text = texts[batch[place]]
            expected = [text[position - d] if position >= d else torch.full((width,), -1.0) for d in distances]
            assert torch.equal(values, torch.stack(expected))
        for number, count in zip(batch, counts, strict=True):
            done[number] += count


def test_tokens_that_fill_a_batch_up_count_to_the_last_request() -> None:
    assert request_of(torch.tensor([0, 2, 3]), 6).tolist() == [0, 0, 1, 1, 1, 1]
