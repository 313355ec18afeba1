"""Opens the faster directory available here."""

from kernels import compiled_loops
from offload.window.directory import Directory


def open_directory(num_rows: int, num_slots: int) -> Directory:
    """A directory, compiled where Numba works. Arguments of `Directory`."""
    if not compiled_loops.available():
        return Directory(num_rows, num_slots)
    from offload.window.directory_numba import CompiledDirectory

    return CompiledDirectory(num_rows, num_slots)
