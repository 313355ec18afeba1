"""What a profile says carries rows is what is launched to carry them."""

import pytest
import torch

from kernels.carriers import CARRIERS
from kernels.records import fetch_records, write_records
from tests.kernels.launches import on_a_gpu


@pytest.mark.parametrize(("direction", "kernel"), [("fetch", "_fetch"), ("write back", "_write")])
def test_kernels_that_carry_are_known_by_name(direction: str, kernel: str) -> None:
    words = torch.zeros(32 * 11)
    host_RW = words[-(words.data_ptr() // 4) % 32 :][: 32 * 10].view(10, 32)  # each record starts a line
    some, names = torch.arange(3), []
    for records_RW in (host_RW, host_RW[:, 1:]):
        with on_a_gpu() as counted:
            if direction == "fetch":
                fetch_records(records_RW, some, records_RW, some)
            else:
                write_records(records_RW, some, records_RW, some)
        names += [name.removeprefix("triton::") for name in counted if name.startswith("triton::")]
    assert names == [f"{kernel}_lines", kernel]
    assert [lane for name in names for lane, pattern in CARRIERS.items() if pattern.match(name)] == [direction] * 2
