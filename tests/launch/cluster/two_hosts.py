"""Two hosts, or more, on one machine: namespaces with address, host name, processes and /tmp of their own, and a link.

They see the machine's files. `SHARED` is the same folder on all of them, `DISK` one of a host's own, which outlives it.
Nothing of the machine's own changes, and all that runs on a host ends with it.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from launch.local.process import _dies_with

SHARED, DISK = Path("/mnt"), Path("/srv")
ADDRESSES = {"n1": "10.77.0.1", "n2": "10.77.0.2"}
_NEEDED = ("unshare", "nsenter", "ip", "tc", "ssh", "ssh-keygen", "/usr/sbin/sshd")


def skip_without_namespaces(*more: str) -> None:
    """Skips where this user cannot make hosts, or one of the programs that they need is not there."""
    if missing := [name for name in (*_NEEDED, *more) if shutil.which(name) is None]:
        pytest.skip(f"needs {', '.join(missing)} (Debian: iproute2, openssh-server, openssh-client)")
    if Path(sys.executable).is_relative_to("/tmp"):
        pytest.skip("each host has a /tmp of its own, and this checkout is there")
    if subprocess.run(["unshare", "-n", "-m", "-p", "-f", "-u", "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs root, to make namespaces")


class Host:
    """One host. `shared` is what all see as `SHARED`, `disk` what it sees as `DISK`."""

    def __init__(self, name: str, shared: Path) -> None:
        self.name, self._shared, self.disk = name, shared, shared / f"disk-{name}"
        self.disk.mkdir()
        self._start()

    def _start(self) -> None:
        name, shared = self.name, self._shared
        setup = f"""
set -e
mount --make-rprivate /
mount --bind {self.disk} {DISK}
mount --bind {shared} {SHARED}
mount --bind {SHARED}/hosts /etc/hosts
mount --bind {SHARED}/nsswitch /etc/nsswitch.conf
mount -t tmpfs none /tmp
mount -t tmpfs none /run
mkdir /run/sshd
hostname {name}
ip link set lo up
touch {SHARED}/{name}.up
exec sleep infinity
"""
        (shared / f"{name}.up").unlink(missing_ok=True)
        command = ["unshare", "-n", "-u", "-m", "-p", "-f", "--kill-child", "--mount-proc", "sh", "-c", setup]
        self._outer = subprocess.Popen(command, preexec_fn=_dies_with(os.getpid()))
        wait_for(shared / f"{name}.up", self._outer)
        self.pid = child_of(self._outer)

    def command(self, *words: str | Path) -> list[str]:
        """A command line that runs on this host."""
        return ["nsenter", "-t", str(self.pid), "-n", "-u", "-m", "-p", "--", *map(str, words)]

    def run(self, *words: str | Path) -> None:
        """Runs a command on this host, which must succeed."""
        subprocess.run(self.command(*words), check=True)

    def processes(self, word: str) -> list[str]:
        """Command lines on this host that have a word in them."""
        shown = subprocess.run(self.command("ps", "-e", "-o", "args="), capture_output=True, text=True, check=True)
        return [line for line in shown.stdout.splitlines() if word in line]

    @contextmanager
    def slow_link(self, rate: str) -> Iterator[None]:
        """What it sends waits for its turn at a rate such as `100mbit`."""
        # Not netem: many kernels are built without it.
        queue = ["tbf", "rate", rate, "burst", "16kbit", "latency", "2000ms"]
        self.run("tc", "qdisc", "add", "dev", "e0", "root", *queue)
        yield
        self.run("tc", "qdisc", "del", "dev", "e0", "root")

    @contextmanager
    def slow_link_to(self, address: str, rate: str) -> Iterator[None]:
        """What it sends to one address waits for its turn at a rate such as `100mbit`."""
        queue = ["tc", "qdisc", "add", "dev", "e0", "root", "handle", "1:", "htb", "default", "1"]
        self.run(*queue)
        for number, each in ((1, "10gbit"), (2, rate)):
            self.run("tc", "class", "add", "dev", "e0", "parent", "1:", "classid", f"1:{number}", "htb", "rate", each)
        match = ["u32", "match", "ip", "dst", f"{address}/32", "flowid", "1:2"]
        self.run("tc", "filter", "add", "dev", "e0", "parent", "1:", "protocol", "ip", *match)
        yield
        self.run("tc", "qdisc", "del", "dev", "e0", "root")

    def join(self, switch: "Host", address: str) -> None:
        """Joins the hosts of a switch by an interface `e0`, and starts its ssh server."""
        self._joined, port = (switch, address), f"to-{self.name}"
        link = ["ip", "link", "add", "e0", "type", "veth", "peer", "name", port, "netns", str(switch.pid)]
        subprocess.run(["nsenter", "-t", str(self.pid), "-n", "--", *link], check=True)
        switch.run("ip", "link", "set", port, "master", "br0", "up")
        self.run("ip", "addr", "add", f"{address}/24", "dev", "e0")
        self.run("ip", "link", "set", "e0", "up")
        self.run("/usr/sbin/sshd", "-f", SHARED / "sshd_config", "-E", SHARED / f"sshd-{self.name}.log")

    def kill(self) -> None:
        """Ends everything that runs on this host, at once."""
        self._outer.kill()
        self._outer.wait()

    def start_again(self) -> None:
        """Starts the host that was killed, with its disk as it was."""
        switch, address = self._joined
        # The kernel takes the interface of a host that is gone away in its own time.
        subprocess.run(switch.command("ip", "link", "del", f"to-{self.name}"), capture_output=True, check=False)
        self._start()
        self.join(switch, address)


def child_of(process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> int:
    """The process that `unshare`, or `nsenter` in a command of a host, has started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return int(children.split()[0])


@contextmanager
def two_hosts(shared: Path, **more: str) -> Iterator[tuple[Host, ...]]:
    """Hosts n1 and n2, joined by a link (`e0` on both), that log in to each other by `ssh -F SHARED/ssh_config`.

    `more` are the addresses of further ones.
    """
    addresses = ADDRESSES | more
    names = "".join(f"{address} {name}\n" for name, address in addresses.items())
    (shared / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
    # No name server is in reach: PyTorch's store would wait for one whenever it looks up who calls.
    (shared / "nsswitch").write_text("passwd: files\ngroup: files\nhosts: files\n")
    for key in ("host_key", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", shared / key], check=True)
    (shared / "sshd_config").write_text(f"""
HostKey {SHARED}/host_key
AuthorizedKeysFile {SHARED}/key.pub
PermitRootLogin yes
StrictModes no
UsePAM no
PidFile none
""")
    (shared / "ssh_config").write_text(f"""
Host *
  IdentityFile {SHARED}/key
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
""")
    with ExitStack() as stack:

        def new(name: str) -> Host:
            host = Host(name, shared)
            stack.callback(host.kill)
            return host

        # Hosts that were joined by one pair of interfaces would lose their own with the other.
        switch = new("switch")
        switch.run("ip", "link", "add", "br0", "type", "bridge")
        switch.run("ip", "link", "set", "br0", "up")
        joined = tuple(map(new, addresses))
        for host in joined:
            host.join(switch, addresses[host.name])
        yield joined


def wait_for(
    path: Path, process: subprocess.Popen[bytes] | subprocess.Popen[str] | None, within_s: float = 240
) -> None:
    """Waits until a file is there, as long as the process that is to make it runs, if one is given."""
    deadline = time.monotonic() + within_s
    while not path.exists():
        assert process is None or process.poll() is None, f"ended before {path.name} was there"
        assert time.monotonic() < deadline, path
        time.sleep(0.05)
