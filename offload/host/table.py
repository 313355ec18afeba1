"""A rank's shard of the tables in host memory, or in a file on a local disk.

R rows of the shard, W words of a record, S words from one record to the next.
"""

import logging
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from offload.host.cores import usable_cores
from offload.host.file_records import FileRecords
from offload.host.limits import local_ranks, memory_limits, require_room
from offload.host.memory import advise, map_anonymous, touch
from offload.host.numa import home_nodes, on_cores_of, place
from offload.host.pinned import Driver, PinnedMemory

_log = logging.getLogger(__name__)

_MAX_PINNING_THREADS = 8
_ANYWHERE = "pages come from where they are first written"


class HostTable:
    """Records of a shard in memory of exactly the requested size, all zero: no row was ever updated.

    Args:
        num_rows: rows of the shard.
        words: fp32 words of a record.
        stride: words from one record to the next; the rest is padding. None for records side by side.
        touch_pages: allocates all memory now, in parallel, in huge pages where the system gives them. Otherwise a page
            is allocated when it is first written, and is a small one: rows lie scattered, so in huge pages the first
            few steps would have to clear nearly the whole table.
        device: of the window.
        beside: bytes of memory that something else keeps for these rows.

    Raises:
        Unavailable: memory or limits do not hold the shards of all ranks on this machine with every row touched.
    """

    records_RW: Tensor
    """fp32 [R, W]: the memory itself, without the padding. After `close` it is empty."""
    device_RW: Tensor | None = None
    """fp32 [R, W]: the same memory, as the GPU that `pin` was called for sees it; None until then and after `close`."""

    def __init__(
        self,
        num_rows: int,
        words: int,
        *,
        stride: int | None = None,
        touch_pages: bool = False,
        device: torch.device | str = "cpu",
        beside: int = 0,
    ) -> None:
        stride = words if stride is None else stride
        size = max(num_rows * stride * 4, 4)  # a mapping of zero bytes is refused: an empty shard keeps one word
        require_room(size + beside, memory_limits(), local_ranks())
        memory = map_anonymous(size)
        words_N = torch.frombuffer(memory, dtype=torch.float32)
        self._words_N: Tensor | None = words_N
        self._pinned: PinnedMemory | None = None
        self._padded_RS = words_N[: num_rows * stride].view(num_rows, stride)
        self.records_RW = self._padded_RS[:, :words]
        home = home_nodes(torch.device(device))
        nodes = place(words_N, home)
        advise(memory, "MADV_HUGEPAGE" if touch_pages else "MADV_NOHUGEPAGE")
        if touch_pages:
            _touch(words_N, home - nodes)
        elif home != nodes:
            _warn(home, _ANYWHERE)

    @property
    def nbytes(self) -> int:
        """Bytes of the shard's records and of the padding between them."""
        return self._padded_RS.nbytes

    def pin(self, driver: Driver, device: torch.device, tell: Callable[[str], None] = lambda text: None) -> Tensor:
        """Locks the memory for the transfers of a GPU; `tell` is told now and then how far that is.

        Returns:
            `device_RW`.

        Raises:
            PinError: the driver refuses, which leaves everything as it was.
        """
        if self._words_N is None or self._pinned is not None:
            raise RuntimeError("the table is closed or pinned already")
        threads = max(1, min(_MAX_PINNING_THREADS, usable_cores() // local_ranks()))
        pinned = PinnedMemory(self._words_N, driver, threads=threads, tell=tell)
        try:
            padded_RS = pinned.view(device)[: self._padded_RS.numel()].view(self._padded_RS.shape)
            self.device_RW = padded_RS[:, : self.records_RW.shape[1]]
        except BaseException:
            pinned.close()
            raise
        self._pinned = pinned
        return self.device_RW

    def unpin(self) -> None:
        """Undoes `pin`, if need be. Nothing on the GPU may be using the memory."""
        self.device_RW = None
        pinned, self._pinned = self._pinned, None
        if pinned is not None:
            pinned.close()

    def close(self) -> None:
        """Releases the memory: it is gone when nobody holds a part of `records_RW` any more. It is unpinned at once."""
        self.unpin()
        self._words_N = None
        # The tensors alone hold the mapping: unmapped while one is in use, it would crash the process.
        self._padded_RS = self._padded_RS.new_empty(0, self._padded_RS.shape[1])
        self.records_RW = self._padded_RS[:, : self.records_RW.shape[1]]


class FileTable:
    """Records of a shard in a file on a local disk, all zero: no row was ever updated.

    Args:
        num_rows: rows of the shard.
        words: fp32 words of a record.
        folder: on the disk.
        beside: bytes of memory that something else keeps for these rows.

    Raises:
        Unavailable: disk or memory do not hold them.
    """

    device_RW = None
    """A file is not pinned."""

    def __init__(self, num_rows: int, words: int, folder: str, *, beside: int = 0) -> None:
        require_room(beside, memory_limits(), local_ranks())
        self.records_RW = FileRecords(num_rows, words, folder)

    def close(self) -> None:
        """Releases the file."""
        self.records_RW.close()


def _touch(words_N: Tensor, unplaced: set[int]) -> None:
    """Touches all pages; those for nodes on which the system places nothing, from the cores of these nodes."""
    threads = usable_cores() // local_ranks()
    with on_cores_of(unplaced) if unplaced else nullcontext(False) as at_home:
        touch(words_N, threads)
    if unplaced:
        _warn(unplaced, "pages were touched from cores there instead" if at_home else _ANYWHERE)


def _warn(unplaced: set[int], instead: str) -> None:
    nodes = ", ".join(map(str, sorted(unplaced)))
    _log.warning("the system places no memory on NUMA node %s (a container needs CAP_SYS_NICE): %s", nodes, instead)
