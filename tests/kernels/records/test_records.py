import pytest
import torch

from kernels.records import draw_records, fetch_records, job_wide_ids, write_records
from kernels.records.row_init import initial_rows
from tests.kernels.record_tables import SEED, STD, RecordShape, random_records

SHAPES = [RecordShape(5, 10), RecordShape(5, 1, torch.bfloat16), RecordShape(4, 1, torch.bfloat16, apart=3)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_fetch_row_by_row(shape, dtype):
    host, window = random_records(shape, 20, seed=0), random_records(shape, 9, seed=1)
    expected, table = window.view(torch.int32).clone(), host.clone()
    rows, slots = torch.tensor([19, 0, 3, 11, 10], dtype=dtype), torch.tensor([0, 8, 2, 5, 4], dtype=dtype)
    fetch_records(host, rows, window, slots)
    for row, slot in zip(rows.tolist(), slots.tolist(), strict=True):
        expected[slot] = table[row].view(torch.int32)
    assert torch.equal(window.view(torch.int32), expected)
    assert torch.equal(host.view(torch.int32), table.view(torch.int32))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_draw_row_by_row(shape, dtype):
    window = random_records(shape, 9, seed=1)
    expected = window.clone()
    rows, slots = torch.tensor([19, 0, 3, 11, 10], dtype=dtype), torch.tensor([0, 8, 2, 5, 4], dtype=dtype)
    ranges = torch.tensor([[0, 1000], [4, -4], [11, 2**40]])
    draw_records(window, slots, rows, id_ranges_M2=ranges, **shape.initial)
    ids = [19 + 2**40, 1000, 1003, 11 + 2**40, 6]
    for slot, row_id in zip(slots.tolist(), ids, strict=True):
        drawn = initial_rows(torch.tensor([row_id]), shape.dim, seed=SEED, std=STD)[0].to(shape.row_dtype)
        expected[slot] = 0
        expected[slot, : shape.weight_words].view(shape.row_dtype)[: shape.dim] = drawn
    assert torch.equal(window.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_write_row_by_row(shape, dtype):
    host, window = random_records(shape, 20, seed=0), random_records(shape, 9, seed=1)
    expected = host.view(torch.int32).clone()
    rows, slots = torch.tensor([19, 0, 3], dtype=dtype), torch.tensor([0, 8, 2], dtype=dtype)
    for row, slot in zip(rows.tolist(), slots.tolist(), strict=True):
        expected[row] = window[slot].view(torch.int32)
    write_records(window, slots, host, rows)
    assert torch.equal(host.view(torch.int32), expected)


def test_ids_of_ranges_and_of_empty_ones():
    ranges = torch.tensor([[0, 10], [3, 20], [3, 30], [7, -7]])
    assert job_wide_ids(torch.tensor([0, 2, 3, 6, 7, 9]), ranges).tolist() == [10, 12, 33, 36, 0, 2]


def test_nothing_to_move():
    host, window, none = torch.ones(3, 8), torch.zeros(2, 8), torch.empty(0, dtype=torch.int64)
    fetch_records(host, none, window, none)
    draw_records(window, none, none, id_ranges_M2=torch.zeros(1, 2).long(), **RecordShape(5, 2).initial)
    write_records(window, none, host, none)
    assert host.eq(1).all()
    assert window.eq(0).all()


@pytest.mark.parametrize(
    ("host", "window", "message"),
    [
        (torch.zeros(3, 16)[:, :5], torch.zeros(3, 8)[:, :5], "lie 16 words apart, but slots 8 words"),
        (torch.zeros(23).as_strided((3, 5), (8, 1)), torch.zeros(3, 8)[:, :5], "host memory ends before"),
        (torch.zeros(3, 8)[:, :5], torch.zeros(23).as_strided((3, 5), (8, 1)), "the window ends before"),
    ],
)
def test_padding_that_is_not_there_is_refused(host, window, message):
    places = torch.arange(2)
    write_records(window, places, host, places)
    with pytest.raises(ValueError, match=message):
        write_records(window, places, host, places, padded=True)


@pytest.mark.parametrize(
    ("host", "rows", "window", "slots", "message"),
    [
        (torch.zeros(3, 8), torch.arange(2), torch.zeros(3, 7), torch.arange(2), "8 words do not fit slots of 7"),
        (torch.zeros(3, 8), torch.arange(2), torch.zeros(3, 8), torch.arange(3), "2 rows cannot be moved"),
        (torch.zeros(8, 3).T, torch.arange(2), torch.zeros(3, 8), torch.arange(2), "host memory must be float32"),
        (torch.zeros(3, 8), torch.arange(2), torch.zeros(3, 8).half(), torch.arange(2), "the window must be float32"),
        (torch.zeros(3, 8), torch.arange(2).float(), torch.zeros(3, 8), torch.arange(2), "rows must be contiguous"),
        (torch.zeros(3, 8), torch.arange(2), torch.zeros(3, 8), torch.arange(4)[::2], "slots must be contiguous"),
    ],
)
def test_what_does_not_fit_is_refused(host, rows, window, slots, message):
    with pytest.raises(ValueError, match=message):
        write_records(window, slots, host, rows)
