"""A GPU's streams, without one."""

from typing import Any
from unittest import mock

import torch

from offload.device import streams
from offload.device.streams import CudaStreams


class FakeStream:
    """As torch's: made anew, or another name for one that was."""

    made = 0

    def __init__(self, device: Any = None, priority: int = 0, *, stream_id: int = 0, **same: Any) -> None:
        if device is not None:
            FakeStream.made += 1
        self.stream_id = stream_id or FakeStream.made
        self.device_index = self.device_type = 0


def test_streams_are_used_again_when_nobody_has_them_any_more() -> None:
    """A GPU has 32, whatever is opened and closed."""
    with mock.patch.object(torch.cuda, "Stream", FakeStream), mock.patch.object(streams, "_spare", {}):
        gpu, other = (CudaStreams(torch.device("cuda", number)) for number in (0, 1))
        kept = gpu.new()
        used = {gpu.new().stream_id for _ in range(100)}
        assert len(used) == 1
        assert kept.stream_id not in used
        one, two = gpu.new(), CudaStreams(torch.device("cuda", 0)).new()
        assert len({kept.stream_id, one.stream_id, two.stream_id}) == 3
        assert other.new().stream_id not in {kept.stream_id, one.stream_id, two.stream_id}
