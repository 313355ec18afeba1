import signal
import subprocess
import sys

import pytest

from tests.signals import skip_if_ignored
from train.data.interruptible import interruptible

PROGRAM = """
import hashlib, os
from train.data.interruptible import interruptible
def work():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # many minutes of C
try:
    interruptible(work)
except KeyboardInterrupt:
    os._exit(7)
"""


def test_a_signal_ends_the_wait_for_a_call_that_does_not_return() -> None:
    skip_if_ignored(signal.SIGINT)
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(timeout=10) == 7
        finally:
            process.kill()


def test_it_returns_and_raises_what_the_work_does() -> None:
    assert interruptible(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        interruptible(lambda: 1 // 0)
