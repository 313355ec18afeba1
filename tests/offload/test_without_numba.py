"""Tables train where Numba is missing or refuses its NumPy, with the same bits."""

import sys
from multiprocessing.connection import Connection
from pathlib import Path

from offload.config import OffloadConfig
from tests.offload.tables_job import Job, run_job
from tests.warm import warm_context, warm_process


def digest() -> str:
    return run_job(Job(), OffloadConfig(depth=1, window_rows=400), stop=3).digest


def without_numba(folder: Path, sender: Connection) -> None:
    """Sends the digest of a process that has imported nothing of ours before its Numba was a broken one."""
    sys.path.insert(0, str(folder))
    for name in [name for name in sys.modules if name.partition(".")[0] in ("numba", "kernels", "offload", "tests")]:
        del sys.modules[name]
    from kernels import compiled_loops
    from tests.offload import test_without_numba

    assert not compiled_loops.available()
    sender.send(test_without_numba.digest())


def test_a_window_without_compiled_loops_has_the_same_bits(tmp_path: Path) -> None:
    (tmp_path / "numba.py").write_text("raise ImportError('Numba needs NumPy 1.9 or less')")
    receiver, sender = warm_context().Pipe(duplex=False)
    process = warm_process(without_numba, tmp_path, sender)
    process.start()
    sender.close()
    assert receiver.recv() == digest()
    process.join()
