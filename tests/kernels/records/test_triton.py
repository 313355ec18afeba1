from itertools import product

import pytest
import torch

from kernels import records
from kernels.records import fresh_triton
from kernels.records import triton as records_triton
from tests.kernels.own_process import compile_launches
from tests.kernels.record_tables import RecordShape, random_records, sparse_words, table_at_a_line

BF16 = torch.bfloat16
SHAPES = [
    RecordShape(3, 1),
    RecordShape(1, 0),
    RecordShape(80, 1, BF16),  # 168 bytes
    RecordShape(33, 2, BF16, before=5),  # an odd row, memory that does not start at a line
    RecordShape(20, 19),  # 160 bytes
    RecordShape(40, 20, apart=3),  # 256 bytes apart: every record at a line's start
    RecordShape(80, 47),  # 512 bytes
    RecordShape(80, 159),  # 960 bytes
    RecordShape(80, 160),  # Adam, fp32: 964 bytes, aligned to words alone
    RecordShape(80, 160, apart=3),  # 244 words apart: aligned to 16 bytes
    RecordShape(80, 207),  # 1152 bytes
    RecordShape(1500, 3000, before=1),  # a record larger than a tile: few of them are tested
]
PADDED = [
    RecordShape(80, 160, apart=15, padded=True),  # whole lines, a power of two
    RecordShape(80, 160, BF16, apart=23, padded=True),  # 7 lines
    RecordShape(20, 40, apart=3, padded=True),  # 2 lines: less than a warp moves at a time
    RecordShape(80, 1, apart=6, padded=True),  # whole sectors
    RecordShape(1500, 3000, apart=11, padded=True),
]
FEW = (SHAPES[2], SHAPES[8], SHAPES[9], PADDED[2])
"""Of which `make test` takes a single record too; the rest in numbers alone."""
RANGES = torch.tensor([[0, 2**40], [7, -7], [7, 5], [30, 1]])


def single(shapes, many, *singles):
    """Each shape in many records, few of them also in `singles`; those of the others are long."""
    marks = {True: (), False: pytest.mark.long}
    few = [pytest.param(shape, *each, marks=marks[shape in FEW]) for shape, each in product(shapes, singles)]
    return [(shape, *many) for shape in shapes] + few


def everything(records):
    """All words of the memory that records lie in, those between them included."""
    return torch.tensor([]).set_(records.untyped_storage().cpu()).view(torch.int32)


def whole(records):
    """The records and what lies between them, a row at a time."""
    return records.as_strided((len(records), records.stride(0)), records.stride())


def some(count, limit, seed, dtype=torch.int64):
    return torch.randperm(limit, generator=torch.Generator().manual_seed(seed))[:count].to(dtype)


def tables(shape, device):
    """Host memory and a window for a kernel, and the same for the reference."""
    host = random_records(shape, 300, seed=0, pinned=device.type == "cuda")
    window = random_records(shape, 200, seed=1)
    return host, window.to(device), random_records(shape, 300, seed=0), window.clone()


def fewer(count, shape):
    """As many records as a test takes: of large ones each program has several all the same."""
    return count if shape.words < 1500 else min(count, 11)


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


@pytest.mark.parametrize(("shape", "count", "programs"), single(SHAPES, (150, 3), (1, 16)), ids=str)
def test_fetch_is_that_of_the_reference(kernel_device, shape, count, programs):
    host, window, same_host, same_window = tables(shape, kernel_device)
    count = fewer(count, shape)
    rows, slots = some(count, 300, 2), some(count, 200, 3)
    here = [t.to(kernel_device) for t in (rows, slots)]
    records_triton.fetch_records(host, here[0], window, here[1], programs=programs)
    records.fetch_records(same_host, rows, same_window, slots)
    assert torch.equal(window.cpu().view(torch.int32), same_window.view(torch.int32))
    assert torch.equal(everything(host), everything(same_host))


@pytest.mark.parametrize(("shape", "count", "programs"), single(SHAPES, (150, 3), (1, 16)), ids=str)
def test_write_is_that_of_the_reference(kernel_device, shape, count, programs):
    host, window, same_host, same_window = tables(shape, kernel_device)
    count = fewer(count, shape)
    rows, slots = some(count, 300, 2), some(count, 200, 3)
    records_triton.write_records(window, slots.to(kernel_device), host, rows.to(kernel_device), programs=programs)
    synchronize(kernel_device)
    records.write_records(same_window, slots, same_host, rows)
    assert torch.equal(everything(host), everything(same_host))
    assert torch.equal(window.cpu().view(torch.int32), same_window.view(torch.int32))


@pytest.mark.parametrize(("shape", "count"), single(SHAPES + PADDED, (30,), (1,)), ids=str)
def test_drawn_records_are_those_of_the_reference(kernel_device, shape, count):
    _, window, _, expected = tables(shape, kernel_device)
    around = everything(window).clone()
    rows, slots = some(fewer(count, shape), 300, 2), some(fewer(count, shape), 200, 3)
    here = [t.to(kernel_device) for t in (rows, slots, RANGES)]
    fresh_triton.draw_records(window, here[1], here[0], id_ranges_M2=here[2], **shape.initial)
    records.draw_records(expected, slots, rows, id_ranges_M2=RANGES, **shape.initial)
    assert torch.equal(window.cpu().view(torch.int32), expected.view(torch.int32))
    window.copy_(random_records(shape, 200, seed=1))
    assert torch.equal(everything(window), around), "what lies between records was written"


@pytest.mark.parametrize(("shape", "count", "programs"), single(PADDED, (150, 3), (1, 16), (17, 2)), ids=str)
def test_padded_records_travel_with_their_padding_and_nothing_else_does(kernel_device, shape, count, programs):
    host, _, same_host, same_window = tables(shape, kernel_device)
    expected_host, expected = whole(same_host).clone(), whole(random_records(shape, 200, seed=1))
    window = expected.clone().to(kernel_device)[:, : shape.words]
    count = fewer(count, shape)
    rows, slots, others = some(count, 300, 2), some(count, 200, 3), some(count, 300, 4)
    here = [t.to(kernel_device) for t in (rows, slots, others)]
    how = {"padded": True, "programs": programs}
    records_triton.fetch_records(host, here[0], window, here[1], **how)
    records.fetch_records(same_host, rows, same_window, slots)
    expected[slots] = expected_host[rows]
    expected[:, : shape.words] = same_window
    assert torch.equal(whole(window).cpu().view(torch.int32), expected.view(torch.int32))
    records_triton.write_records(window, here[1], host, here[2], **how)
    synchronize(kernel_device)
    expected_host[others] = expected[slots]
    assert torch.equal(whole(host).view(torch.int32), expected_host.view(torch.int32))


@pytest.mark.parametrize("window_apart", [0, 15])
def test_records_that_start_lines_leave_what_is_no_padding_alone(kernel_device, window_apart):
    shape, there = RecordShape(80, 160, apart=15), RecordShape(80, 160, apart=window_apart)
    host, same_host = (random_records(shape, 300, seed=0, pinned=kernel_device.type == "cuda") for _ in range(2))
    memory = whole(random_records(there, 200, seed=1))
    window, same_window = memory.to(kernel_device)[:, : shape.words], memory.clone()[:, : shape.words]
    rows, slots = some(150, 300, 2), some(150, 200, 3)
    here = [t.to(kernel_device) for t in (rows, slots)]
    records_triton.fetch_records(host, here[0], window, here[1], programs=3)
    records_triton.write_records(window, here[1], host, here[0].flip(0), programs=3)
    synchronize(kernel_device)
    records.fetch_records(same_host, rows, same_window, slots)
    records.write_records(same_window, slots, same_host, rows.flip(0))
    assert torch.equal(everything(window), everything(same_window))
    assert torch.equal(everything(host), everything(same_host))


@pytest.mark.parametrize(("row_type", "slot_type"), [(torch.int32, torch.int64), (torch.int64, torch.int32)])
def test_numbers_of_32_bits(kernel_device, row_type, slot_type):
    shape = RecordShape(80, 47)
    host, window, _, expected = tables(shape, kernel_device)
    rows, slots = some(50, 300, 2, row_type), some(50, 200, 3, slot_type)
    here = [t.to(kernel_device) for t in (rows, slots)]
    records_triton.fetch_records(host, here[0], window, here[1], programs=2)
    records.fetch_records(host.clone(), rows, expected, slots)
    assert torch.equal(window.cpu().view(torch.int32), expected.view(torch.int32))
    before = host.clone()
    records_triton.write_records(window, here[1], host, here[0], programs=2)
    synchronize(kernel_device)
    records.write_records(expected, slots, before, rows)
    assert torch.equal(host.view(torch.int32), before.view(torch.int32))


def test_nothing_to_move(kernel_device):
    shape = RecordShape(5, 2)
    host, window, same_host, same_window = tables(shape, kernel_device)
    none = torch.empty(0, dtype=torch.int64, device=kernel_device)
    records_triton.fetch_records(host, none, window, none, programs=2)
    ranges = RANGES.to(kernel_device)
    fresh_triton.draw_records(window, none, none, id_ranges_M2=ranges, **shape.initial)
    records_triton.write_records(window, none, host, none, programs=2)
    assert torch.equal(everything(host), everything(same_host))
    assert torch.equal(window.cpu().view(torch.int32), same_window.view(torch.int32))


@pytest.mark.parametrize("shape", [RecordShape(5, 2), RecordShape(20, 11)], ids=["8 words", "a line"])
def test_tables_of_more_than_2_31_words(kernel_device, shape):
    num_rows = 2**31 // shape.words + 100
    host = (
        sparse_words(num_rows * shape.words)
        if kernel_device.type == "cpu"
        else torch.zeros(num_rows * shape.words, device=kernel_device)
    )
    host = host.view(num_rows, shape.words)
    rows = torch.tensor([num_rows - 1, 0, num_rows - 100, num_rows - 101, num_rows // 2], device=kernel_device)
    slots = torch.tensor([4, 3, 2, 1, 0], device=kernel_device)
    window = random_records(shape, 5, seed=0, fresh=0).to(kernel_device)
    records_triton.write_records(window, slots, host, rows, programs=1)
    assert torch.equal(host[rows].view(torch.int32), window[slots].view(torch.int32))
    back = torch.zeros_like(window)
    records_triton.fetch_records(host, rows, back, slots, programs=1)
    assert torch.equal(back.view(torch.int32), window.view(torch.int32))


@pytest.mark.gpu
def test_the_public_functions_wait_for_nothing():
    device, shape = torch.device("cuda"), RecordShape(80, 160)
    host, window, same_host, same_window = tables(shape, device)
    rows, slots = some(150, 300, 2), some(150, 200, 3)
    here = [t.to(device) for t in (rows, slots, RANGES)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        records.fetch_records(host, here[0][:100], window, here[1][:100])
        records.draw_records(window, here[1][100:], here[0][100:], id_ranges_M2=here[2], **shape.initial)
        records.write_records(window, here[1], host, here[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    synchronize(device)
    records.fetch_records(same_host, rows[:100], same_window, slots[:100])
    records.draw_records(same_window, slots[100:], rows[100:], id_ranges_M2=RANGES, **shape.initial)
    records.write_records(same_window, slots, same_host, rows)
    assert torch.equal(everything(host), everything(same_host))
    assert torch.equal(window.cpu().view(torch.int32), same_window.view(torch.int32))


def launches():
    numbers, shape = torch.arange(300), RecordShape(80, 160, apart=15)
    host = table_at_a_line(shape, 300)
    for seed, here in [(1, numbers), (2**40, numbers[1:]), (-1, numbers[:16]), (0, numbers[:1])]:
        records_triton.fetch_records(host, here, host, here, padded=True, programs=16)
        fresh_triton.draw_records(host, here, here, id_ranges_M2=RANGES[:2], **shape.initial | {"seed": seed})
        records_triton.write_records(host, here, host, here, padded=True, programs=16)


def test_compiles_once_for_a_table_with_wide_accesses_in_flight():
    compiled = compile_launches(launches)
    assert [name for name, _ in compiled] == ["_fetch_lines", "_draw_fresh", "_write_lines"] * 4
    assert len({id(code) for _, code in compiled}) == 3  # not compiled again, not even to the same code
    for place, store in ((0, "st.global.v4"), (2, "st.global.cs.v4")):
        name, code = compiled[place]
        assert "cp.async.cg" in code, name
        assert store in code, name
        assert not [line for line in code.splitlines() if "st.global" in line and store not in line], name
