"""What a GPU and its training loop are busy with while transfer engines are compared."""

import torch

from offload.device.streams import Event, Streams


class Products:
    """Large matrix products, which take all of a GPU's processors as a model does: the GPU is the limit.

    Args:
        streams: of the device.
        device: to compute on.
        size: of the square matrices.
        count: of the products.
    """

    def __init__(self, streams: Streams, device: torch.device, size: int = 4096, count: int = 32) -> None:
        # At the 700 TFLOP/s of an H100 they take 6 ms, and the rows of a trial about as long to travel both ways.
        self._streams, self._stream, self._count = streams, streams.new(), count
        self._factor, self._product = (torch.zeros(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
        self._factor.normal_()
        self._stream.wait_event(streams.current().record_event())

    def __call__(self) -> Event:
        """Begins; the mark is behind the last of them."""
        with self._streams.use(self._stream):
            for _ in range(self._count):
                torch.mm(self._factor, self._factor, out=self._product)
        return self._stream.record_event()


class Launches:
    """Operations that take a GPU no time, one by one from Python: the loop that launches them is the limit.

    Args:
        streams: of the device.
        device: to compute on.
        count: of the operations.
    """

    def __init__(self, streams: Streams, device: torch.device, count: int = 2000) -> None:
        # At the 3 to 5 us that a launch takes, about as long as `Products`.
        self._streams, self._stream, self._count = streams, streams.new(), count
        self._number = torch.zeros(1, device=device)
        self._stream.wait_event(streams.current().record_event())

    def __call__(self) -> Event:
        """Returns when all are launched; the mark is behind the last of them."""
        with self._streams.use(self._stream):
            for _ in range(self._count):
                self._number.add_(1.0)
        return self._stream.record_event()
