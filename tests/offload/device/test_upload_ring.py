"""Numbers in a ring: nothing is overwritten while the device needs it, and the host waits only for that."""

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offload.device.streams import HostStreams
from offload.device.upload_ring import UploadRing

CPU = torch.device("cpu")


@dataclass
class Mark:
    """An event that is reached only when somebody waits for it, or for a later one."""

    number: int
    log: list[int]

    def synchronize(self) -> None:
        self.log.append(self.number)

    def query(self) -> bool:
        return False


@dataclass
class Call:
    here: torch.Tensor
    there: tuple[torch.Tensor, ...]
    sent: tuple[torch.Tensor, ...]
    mark: Mark = field(repr=False)


@given(sizes=st.lists(st.integers(0, 50), max_size=40), capacity=st.integers(4, 10))
def test_what_is_in_use_keeps_its_value(sizes: list[int], capacity: int) -> None:
    ring = UploadRing(HostStreams(), CPU, 32 * capacity)
    waited: list[int] = []
    calls: list[Call] = []
    for number, size in enumerate(sizes):
        sent = torch.arange(size) + 1000 * number, -torch.arange(size) - 1000 * number
        there = ring.put(*sent)
        mark = Mark(number, waited)
        ring.keep_until(mark)
        calls.append(Call(ring._here, there, sent, mark))
        done = max(waited, default=-1)
        for call in calls[done + 1 :]:
            assert all(map(torch.equal, call.there, call.sent)), "numbers in use were overwritten"
        in_use = sum(UploadRing.size(2, len(call.sent[0])) for call in calls[done + 1 :])
        assert in_use <= 32 * capacity
    assert waited == sorted(waited)


def test_the_host_does_not_wait_while_there_is_room() -> None:
    waited: list[int] = []
    ring = UploadRing(HostStreams(), CPU, UploadRing.size(2, 30) * 3)
    for number in range(3):
        ring.put(torch.arange(30), torch.arange(30))
        ring.keep_until(Mark(number, waited))
    assert waited == []
    ring.put(torch.arange(30), torch.arange(30))
    assert waited == [0]


@pytest.mark.parametrize("size", [0, 1])
def test_what_the_device_is_done_with_is_forgotten(size: int) -> None:
    """A window that holds all rows fetches none, in every step of a run."""
    ring = UploadRing(HostStreams(), CPU, 1 << 16)
    for _ in range(100):
        ring.put(torch.arange(size))
        ring.keep_until(HostStreams().current().record_event())
    assert len(ring._taken) == 1


def test_more_than_the_ring_holds_is_an_error() -> None:
    with pytest.raises(ValueError, match="48 numbers for a ring of 32"):
        UploadRing(HostStreams(), CPU, 32).put(torch.arange(40))
