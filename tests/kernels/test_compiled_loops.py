"""Numba is used where it works, and nothing breaks where it does not."""

import contextlib
import io
import os
import shutil
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from kernels import compiled_loops
from kernels.deduplicate import deduplicate
from tests.warm import warm_context, warm_process


def test_a_numba_that_refuses_its_numpy_is_as_good_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "numba.py").write_text("raise ImportError('Numba needs NumPy 1.9 or less')")
    for name in [name for name in sys.modules if name.partition(".")[0] == "numba"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    compiled_loops.available.cache_clear()
    try:
        assert not compiled_loops.available()
        rows_U, (index,) = deduplicate([torch.tensor([5, 3, 5])])
        assert rows_U.tolist() == [3, 5]
        assert index.index_N.tolist() == [1, 0, 1]
    finally:
        compiled_loops.available.cache_clear()


TOTAL = """
from kernels.numba_intrinsics import compiled
from kernels.value import VALUE

@compiled
def total():
    return VALUE
"""


class InCopy:
    """A Python program, started, where `kernels` is the folder's own, and the user's home another one."""

    def __init__(self, folder: Path, statement: str, home: Path) -> None:
        self._receiver, sender = warm_context().Pipe(duplex=False)
        self._process = warm_process(_say, folder, f"from kernels.total import total; {statement}", home, sender)
        self._process.start()
        sender.close()

    def output(self) -> str:
        """What it has printed, when it is done."""
        try:
            return self._receiver.recv()
        finally:
            self._process.join()


def _say(folder: Path, program: str, home: Path, sender: Connection) -> None:
    from numba import config

    for name in [name for name in sys.modules if name.partition(".")[0] == "kernels"]:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    os.environ.clear()
    os.environ.update(PATH="", HOME=str(home))
    config.CACHE_DIR = ""  # read from the environment when Numba was imported
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(program, {})
    sender.send(said.getvalue().strip())


def copy_of_total(folder: Path, value: int) -> Path:
    """A folder with a loop that takes a value from another file."""
    (folder / "kernels").mkdir(parents=True)
    (folder / "kernels" / "__init__.py").touch()
    for name in ("numba_intrinsics.py", "compiled_cache.py"):
        shutil.copy(Path(compiled_loops.__file__).parent / name, folder / "kernels")
    (folder / "kernels" / "total.py").write_text(TOTAL)
    (folder / "kernels" / "value.py").write_text(f"VALUE = {value}")
    return folder


def test_what_is_compiled_follows_the_files_that_it_uses_and_serves_every_copy_of_them(tmp_path: Path) -> None:
    told = "print(total(), sum(total.stats.cache_hits.values()))"

    def total(copy: str, value: int) -> str:
        return InCopy(copy_of_total(tmp_path / copy, value), told, tmp_path).output()

    assert total("a", 3) == "3 0"
    assert total("b", 3) == "3 1", "compiled again for another copy"
    assert total("c", 40) == "40 0"


def test_of_processes_that_start_at_once_one_compiles(tmp_path: Path) -> None:
    folder = copy_of_total(tmp_path / "a", 3)
    told = "total(); print(sum(total.stats.cache_misses.values()))"
    together = [InCopy(folder, told, tmp_path) for _ in range(3)]
    assert sorted(process.output() for process in together) == ["0", "0", "1"]


FORKED = """
import os
child = os.fork()
if not child:
    try:
        os._exit(total())
    finally:
        os._exit(1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_process_that_was_forked_compiles_what_its_parent_has_not(tmp_path: Path) -> None:
    assert InCopy(copy_of_total(tmp_path / "a", 3), FORKED, tmp_path).output() == "3"


def test_who_cannot_compile_lets_the_others_go_on(tmp_path: Path) -> None:
    folder = copy_of_total(tmp_path / "a", 3)
    (folder / "kernels" / "value.py").write_text("VALUE = object()")
    told = "\ntry: total()\nexcept Exception as error: print(type(error).__name__, total._cache._lock.is_locked)"
    assert InCopy(folder, told, tmp_path).output() == "TypingError False"


def test_what_was_compiled_goes_when_it_was_not_used_for_long_and_something_new_comes(tmp_path: Path) -> None:
    def states() -> dict[str, Path]:
        return {path.name: path for path in tmp_path.glob("**/numba/*")}

    old, used = (copy_of_total(tmp_path / name, value) for name, value in (("a", 3), ("b", 4)))
    names = []
    for folder in (old, used):
        InCopy(folder, "total()", tmp_path).output()
        names += states().keys() - {*names}
    (states()[names[0]].parent / "others").mkdir()
    for path in states().values():
        os.utime(path, (0, 0))
    InCopy(used, "total()", tmp_path).output()
    assert {*names, "others"} == states().keys(), "there was nothing new"
    InCopy(copy_of_total(tmp_path / "c", 5), "total()", tmp_path).output()
    assert {*names, "others"} - states().keys() == {names[0]}


def test_where_no_folder_can_be_written_loops_are_compiled_all_the_same(tmp_path: Path) -> None:
    folder = copy_of_total(tmp_path / "a", 3)
    home = folder / "kernels" / "value.py"  # below a file there is no folder, whoever asks
    (folder / "kernels" / "__pycache__").touch()
    assert InCopy(folder, "print(total())", home).output() == "3"
