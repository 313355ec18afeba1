"""What every engine that carries records between host memory and the window can do."""

from typing import Protocol

from torch import Tensor

from offload.transfers.copies import Copy


class Transfers(Protocol):
    """An engine. Copies of one direction land in the order in which they were requested."""

    name: str
    """The engine's name in `offload.engine`."""
    stream_ordered: bool
    """Whether `Copy.order_fetches` of a write-back never makes the host wait."""

    def fetch(self, rows: Tensor, slots: Tensor, stored: int) -> Copy:
        """Brings records of `rows` into `slots`: those of the first `stored` from host memory, the others drawn.

        It begins once what the caller's stream was given so far is done.

        Args:
            rows: places in the shard, int64, on the host.
            stored: how many of the rows were ever updated; they come first.
            slots: int64, on the host. Nobody may be copying them or these rows to host memory, unless that copy has
                landed or was told to come first (`Copy.order_fetches`).
        """

    def write_back(self, slots: Tensor, rows: Tensor) -> Copy:
        """Copies records of `slots` to `rows`. It begins once what the caller's stream was given so far is done."""

    def close(self) -> None:
        """Waits for what is under way and ends background work."""
