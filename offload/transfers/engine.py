"""What carries records between host memory and the window, whichever way it does."""

from typing import Protocol

from torch import Tensor

from offload.transfers.copies import Copy


class Transfers(Protocol):
    """An engine. Copies of one direction land in the order in which they were asked for."""

    name: str
    """The engine's, as `offload.engine` calls it."""
    stream_ordered: bool
    """Whether `Copy.order_fetches` of a write-back never makes the host wait."""

    def fetch(self, rows: Tensor, slots: Tensor, stored: int) -> Copy:
        """Brings records of `rows` into `slots`: of the first `stored` from host memory, drawn of the others.

        It begins when what the caller's stream was given so far is done.

        Args:
            rows: places in the shard, int64, on the host.
            stored: how many of the rows were ever updated; they come first.
            slots: int64, on the host. Nobody may be copying them or these rows to host memory, unless that copy has
                landed or was told to come first (`Copy.order_fetches`).
        """

    def write_back(self, slots: Tensor, rows: Tensor) -> Copy:
        """Copies records of `slots` to `rows`. It begins when what the caller's stream was given so far is done."""

    def close(self) -> None:
        """Waits for what is under way and ends background work."""
