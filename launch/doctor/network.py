"""Names, ports and limits by which ranks find each other."""

import resource
import socket
from collections.abc import Iterator

from launch.doctor.check import Check, bound
from launch.local.environment import meeting_port
from train.errors import UserError

_FILES = 4096


def network(port: int | None, hosts: list[str]) -> Iterator[Check]:
    """Checks of this host's name, of those of the job's `hosts`, of its port, and of open files."""
    name = socket.gethostname()
    address = _address(name)
    if address is None:
        yield Check(
            "host name", "warning", f"{name} has no address", f"add {name} to /etc/hosts, with the address others use"
        )
    else:
        loopback = address.startswith("127.")
        remedy = "fine on one host; on several, give it the address others use in /etc/hosts"
        yield bound("host name", "warning", not loopback, f"{name} is {address}", remedy)
    for host in hosts:
        found = _address(host)
        yield bound(
            "host",
            "missing",
            found is not None,
            f"{host} is {found or 'unknown'}",
            "correct launch.hosts, or the names",
        )
    if port is not None:
        yield _port(port)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield bound(
        "open files", "warning", soft >= _FILES or soft == resource.RLIM_INFINITY, f"up to {soft}", f"ulimit -n {hard}"
    )


def _address(name: str) -> str | None:
    try:
        return socket.gethostbyname(name)
    except OSError:
        return None


def _port(port: int) -> Check:
    try:
        meeting_port(port)
    except UserError as error:
        return Check("port", "missing", str(error), "set run.port to another one")
    return Check("port", "ok", f"{port} is free")
