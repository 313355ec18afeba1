import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.signals import skip_if_ignored

SWALLOWS = """
import time
print("ready", flush=True)
try:
    time.sleep(30)
except BaseException:
    pass
"""
IMPORTS = "    import swallows"
WORKS = """
    try:
        print("ready", flush=True)
        time.sleep(30)
    finally:
        print("cleaned up", flush=True)
"""
CLEANS_SLOWLY = """
    try:
        print("ready", flush=True)
        time.sleep(30)
    finally:
        try:
            print("ready", flush=True)
            time.sleep(30)
        except BaseException:
            print("swallowed", flush=True)
"""
PROGRAM = "import time\nfrom launch.local.signals import told_in_one_line\nwith told_in_one_line():\n"


def ended(folder: Path, body: str, signum: int, times: int = 1) -> tuple[str, str, int]:
    """Output, errors and exit code of a program that gets the signal each time that it says it is ready."""
    skip_if_ignored(signum)
    (folder / "swallows.py").write_text(SWALLOWS)
    (folder / "program.py").write_text(PROGRAM + body)
    started = time.monotonic()
    with subprocess.Popen(
        [sys.executable, folder / "program.py"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for _ in range(times):
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signum)
        out, err = process.communicate(timeout=60)
    assert time.monotonic() - started < 20
    return out, err, process.returncode


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_work_is_cleaned_up_before_it_ends(signum: int, tmp_path: Path) -> None:
    told = f"stopped by {signal.Signals(signum).name}\n"
    assert ended(tmp_path, WORKS, signum) == ("cleaned up\n", told, 128 + signum)


def test_an_import_that_would_swallow_an_exception_ends_too(tmp_path: Path) -> None:
    assert ended(tmp_path, IMPORTS, signal.SIGINT) == ("", "stopped by SIGINT\n", 130)


def test_a_second_signal_does_not_wait_for_the_cleaning(tmp_path: Path) -> None:
    assert ended(tmp_path, CLEANS_SLOWLY, signal.SIGINT, times=2) == ("", "stopped by SIGINT\n", 130)


def test_threads_are_not_waited_for(tmp_path: Path) -> None:
    thread = "    import threading\n    threading.Thread(target=time.sleep, args=(30,)).start()"
    assert ended(tmp_path, thread + WORKS, signal.SIGTERM) == ("cleaned up\n", "stopped by SIGTERM\n", 143)
