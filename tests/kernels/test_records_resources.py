"""What copies of records take of a GPU's processor, of which a model's kernels need the rest."""

import torch

from kernels.records_triton import fetch_records, write_records
from tests.kernels.own_process import resources_of_launches
from tests.kernels.record_tables import RecordShape

SHAPES = [
    RecordShape(20, 19),  # 40 words
    RecordShape(80, 1, torch.bfloat16),
    RecordShape(32, 31),  # 64 words: each starts a line
    RecordShape(64, 64),  # 129 words, and as many bf16 ones
    RecordShape(64, 96, torch.bfloat16),
    RecordShape(80, 160),  # 241 words, Adam's
    RecordShape(80, 160, apart=3),
    RecordShape(80, 160, torch.bfloat16),
    RecordShape(96, 191),  # 288 words
    RecordShape(100, 199),  # 300 words
]


def moved_records():
    """A fetch and a write of records of every shape."""
    numbers, ranges = torch.arange(300), torch.tensor([[0, 1], [7, 2]])
    for shape in SHAPES:
        pitch = shape.words + shape.apart
        host = torch.zeros(300 * pitch + 32)
        # Where records lie decides on what is compiled: at a line's start, as pinned memory does.
        host = host[-host.data_ptr() // 4 % 32 :][: 300 * pitch].view(300, pitch)[:, : shape.words]
        fetch_records(host, numbers, host, numbers, id_ranges_M2=ranges, **shape.initial, programs=8)
        write_records(host, numbers, host, numbers, programs=8)


def test_copies_leave_most_of_a_processor_to_others_and_spill_nothing():
    kernels = resources_of_launches(moved_records)
    assert [name for name, _ in kernels] == ["_fetch", "_draw_fresh", "_write"] * len(SHAPES)
    for shape, start in zip(SHAPES, range(0, len(kernels), 3), strict=True):
        for name, needs in kernels[start : start + 3]:
            at_most = 48 if name == "_draw_fresh" else 96
            what = f"{name} of {shape}: {needs}"
            assert needs.registers <= at_most, what
            assert needs.stack == 0, what
            assert needs.threads == 128, what
            # What is on its way lies in shared memory.
            assert needs.shared == 0 if name == "_draw_fresh" else 24 << 10 <= needs.shared <= 36 << 10, what
