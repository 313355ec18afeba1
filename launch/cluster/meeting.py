"""Checks whether the address at which ranks are to meet can be right, before they wait for each other."""

import errno
import os
import socket
import time

from launch.cluster.place import Place
from train.errors import UserError

_RESOLVE_S = 5.0
_RESOLVE_POD_S = 120.0
"""Seconds for which a name is looked up again. A pod's name is known only once the pod has an address."""


def check_meeting(place: Place) -> None:
    """Looks up the master's address, the route to it, and on rank 0 whether address and port are this host's.

    Raises:
        UserError: one of them is wrong; raised within seconds (minutes for the name of a pod).
    """
    family, address = _resolved(place)
    where = f"MASTER_ADDR={place.master_addr} ({address})"
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, place.master_port))  # sends nothing: only the route is looked up
        except OSError as error:
            raise UserError(f"{where}: unreachable from this host ({error.strerror}); check the network") from None
    # torchrun's agent has the port already, perhaps on another host.
    if place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        _check_own(place, family, address, where)


def interface_to(place: Place) -> str | None:
    """Name of the network interface by which this host reaches the master or, as the master, is reached by others.

    None if that is unknown, as where the master's name resolves to a loopback address on its own host.
    """
    import psutil

    family, address = _resolved(place)
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((address, place.master_port))
        own = probe.getsockname()[0]
    if own.startswith("127.") and place.local_world_size < place.world_size:
        return None
    found = [name for name, each in psutil.net_if_addrs().items() if own in {entry.address for entry in each}]
    return found[0] if found else None


def _resolved(place: Place) -> tuple[socket.AddressFamily, str]:
    pod = place.launcher == "Kubernetes"
    until = time.monotonic() + (_RESOLVE_POD_S if pod else _RESOLVE_S)
    while True:
        try:
            found = socket.getaddrinfo(place.master_addr, place.master_port, type=socket.SOCK_STREAM)
            return found[0][0], str(found[0][4][0])
        except (OSError, UnicodeError) as error:
            final = isinstance(error, UnicodeError) or (error.errno == socket.EAI_NONAME and not pod)
            if final or time.monotonic() > until:
                reason = getattr(error, "strerror", None) or str(error)
                raise UserError(
                    f"MASTER_ADDR={place.master_addr}: no such host ({reason}); set it to rank 0's host or address"
                ) from None
        time.sleep(0.5)


def _check_own(place: Place, family: socket.AddressFamily, address: str, where: str) -> None:
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, place.master_port))
        except OSError as error:
            reasons = {
                errno.EADDRNOTAVAIL: f"not an address of {socket.gethostname()}, where rank 0 is; name rank 0's host",
                errno.EADDRINUSE: f"port {place.master_port} is in use there; set MASTER_PORT to a free one",
                errno.EACCES: f"port {place.master_port} is the administrator's; set MASTER_PORT to another one",
            }
            raise UserError(f"{where}: {reasons.get(error.errno or 0, error.strerror)}") from None
