"""What the system gave for a piece of memory."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor


@dataclass(frozen=True)
class Pages:
    """What the system gave for a piece of memory, in bytes."""

    resident: int
    """In physical memory now."""
    huge: int
    """Of that, in huge pages."""


def pages(words: Tensor, smaps: Path = Path("/proc/self/smaps")) -> Pages:
    """Looks up the pages behind a contiguous tensor. Slow for large tables in small pages.

    Args:
        words: the memory.
        smaps: the kernel's listing of mappings. Neighbours of one kind appear there as one, and are counted with it.
    """
    start, end = words.data_ptr(), words.data_ptr() + words.nbytes
    resident = huge = 0
    inside = False
    for line in smaps.read_text().splitlines() if smaps.exists() else ():
        name, *rest = line.split()
        if not name.endswith(":"):
            first, last = (int(bound, 16) for bound in name.split("-"))
            inside = first < end and start < last
        elif inside and name == "Rss:":
            resident += int(rest[0]) * 1024
        elif inside and name == "AnonHugePages:":
            huge += int(rest[0]) * 1024
    return Pages(resident, huge)
