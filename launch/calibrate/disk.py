"""How many records a second a disk reads and writes, as tables in a file ask it to: for `launch.calibrate.machine`."""

from concurrent.futures import ThreadPoolExecutor

import torch

from launch.calibrate.network import typical
from offload.errors import Unavailable
from offload.host.file_records import FileRecords
from train.errors import UserError

_ROWS = 1 << 17  # of the file: Adam's of 80 columns take 128 MiB
_MOVED = 1 << 13


def disk_rate(words: int, folder: str, rows: int = _ROWS) -> float:
    """Records a second, read and written at the same time, half of each, at random places of a file.

    Args:
        words: fp32 words of a record.
        folder: on the disk.
        rows: of the file.

    Raises:
        UserError: the folder cannot be written to, or has too little space.
    """
    try:
        records = FileRecords(rows, words, folder)
    except Unavailable as error:
        raise UserError(f"--calibrate measures the disk that its file is on: {error}") from None
    moved = min(_MOVED, rows // 2)
    window, slots = torch.zeros(2, moved, words), torch.arange(moved)

    def both() -> None:
        places = torch.randperm(rows)[: 2 * moved]
        writing = other.submit(records.write, window[0], slots, places[:moved])
        records.fetch(places[moved:].sort().values, window[1], slots)
        writing.result()

    try:
        with ThreadPoolExecutor(1) as other:
            return 2 * moved / typical(both)
    finally:
        records.close()
