"""What copies of records take of a GPU's processor, of which a model's kernels need the rest."""

from functools import partial

import pytest
import torch

from kernels.records.fresh_triton import draw_records
from kernels.records.triton import fetch_records, write_records
from tests.kernels.own_process import resources_of_launches
from tests.kernels.record_tables import RecordShape, table_at_a_line

CHEAP = [
    RecordShape(80, 160),  # 241 words, Adam's
    RecordShape(80, 160, apart=15, padded=True),
    RecordShape(80, 160, torch.bfloat16, apart=23, padded=True),
    RecordShape(80, 1, torch.bfloat16),
]
LONG = [
    RecordShape(20, 19),  # 40 words
    RecordShape(32, 31),  # 64 words: each starts a line
    RecordShape(64, 64),  # 129 words, and as many bf16 ones
    RecordShape(64, 96, torch.bfloat16),
    RecordShape(80, 160, apart=3),
    RecordShape(80, 160, torch.bfloat16),
    RecordShape(80, 1, apart=6, padded=True),
    RecordShape(80, 1, torch.bfloat16, apart=6, padded=True),
    RecordShape(96, 191),  # 288 words
    RecordShape(100, 199),  # 300 words
]


def moved_records(shape):
    """A fetch, a draw and a write of records."""
    numbers, ranges = torch.arange(300), torch.tensor([[0, 1], [7, 2]])
    # Where records lie decides on what is compiled.
    host, how = table_at_a_line(shape, 300), {"padded": shape.padded, "programs": 8}
    fetch_records(host, numbers, host, numbers, **how)
    draw_records(host, numbers, numbers, id_ranges_M2=ranges, **shape.initial)
    write_records(host, numbers, host, numbers, **how)


@pytest.mark.parametrize("shape", CHEAP + [pytest.param(shape, marks=pytest.mark.long) for shape in LONG], ids=str)
def test_copies_leave_most_of_a_processor_to_others_and_spill_nothing(shape):
    kernels = resources_of_launches(partial(moved_records, shape))
    assert [name.removesuffix("_lines") for name, _ in kernels] == ["_fetch", "_draw_fresh", "_write"]
    for name, needs in kernels:
        at_most = 48 if name == "_draw_fresh" else 72 if name.endswith("_lines") else 96
        assert needs.registers <= at_most, (name, needs)
        assert needs.stack == 0, (name, needs)
        assert needs.threads == 128, (name, needs)
        # What is on its way lies in shared memory.
        assert needs.shared == 0 if name == "_draw_fresh" else 24 << 10 <= needs.shared <= 36 << 10, (name, needs)
