"""The process around an agent such as torchrun's on a node: passes signals on, and the ranks' own exit code back.

`python -m launch.cluster.node [--attached] -- COMMAND...`. Attached, it ends the command when its standard input ends,
as it does with the ssh connection that started it.
"""

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

from launch.local.failures import EXIT_CODE_FILE

_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def run_node(command: Sequence[str], *, attached: bool) -> int:
    """Runs `command` to its end; returns 0, or the exit code that the node's first failed rank left, or its own."""
    with tempfile.TemporaryDirectory(prefix="engram-") as folder:
        left = Path(folder, "exit-code")
        agent = subprocess.Popen(command, env=os.environ | {EXIT_CODE_FILE: str(left)}, stdin=subprocess.DEVNULL)
        for number in _PASSED_ON:
            signal.signal(number, lambda signum, frame: agent.send_signal(signum))
        if attached:
            threading.Thread(target=_end_with_input, args=(agent,), daemon=True).start()
        code = agent.wait()
        if code and left.exists():
            return int(left.read_text())
        return 128 - code if code < 0 else code


def _end_with_input(agent: "subprocess.Popen[bytes]") -> None:
    while os.read(0, 4096):
        pass
    agent.terminate()


def main() -> None:
    """Entry point of the node's process."""
    options, command = sys.argv[1 : sys.argv.index("--")], sys.argv[sys.argv.index("--") + 1 :]
    code = run_node(command, attached="--attached" in options)
    sys.stdout.flush()
    os._exit(code)  # a thread may be reading


if __name__ == "__main__":
    main()
