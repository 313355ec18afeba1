"""The machines of a job, and how long communication between ranks takes.

A collective's time is what the busiest wire of a machine takes: between the GPUs of a node, or through its ports. A
ring or a tree brings each byte of a gather or a reduction into a node once, whatever its number of GPUs; an all-to-all
brings every rank its own bytes.
"""

from dataclasses import dataclass

from launch.plan.hardware import Hardware, Network
from train.errors import UserError

MOST_NODES, MOST_GPUS = 1 << 16, 64


@dataclass(frozen=True)
class Cluster:
    """Machines that are all alike.

    Args:
        nodes: machines.
        gpus_per_node: GPUs, and ranks, of each.
        hardware: what the GPUs are.
        network: between machines; None for one machine.
        gpu: the name of the hardware.
    """

    nodes: int
    gpus_per_node: int
    hardware: Hardware
    network: Network | None
    gpu: str = ""

    def __post_init__(self) -> None:
        if self.nodes > 1 and self.network is None:
            raise UserError(f"--nodes {self.nodes}: say what joins the nodes with --network (ib400, ethernet, ...)")

    @property
    def ranks(self) -> int:
        """GPUs of all machines."""
        return self.nodes * self.gpus_per_node

    def flops_per_second(self, columns: float) -> float:
        """Of one rank while all compute, of products with matrices of so many columns."""
        device = self.hardware.device
        lost = (1 - device.rate_with_all_busy) * min(
            1.0, (self.gpus_per_node - 1) / max(1, self.hardware.node.cores - 1)
        )
        return device.flops_per_second * columns / (columns + device.columns_at_half_rate) * (1 - lost)

    def gathered(self, nbytes: float, steps: int = 1) -> float:
        """Seconds of an all-gather or a reduce-scatter of `nbytes` in all, over all ranks, in `steps` collectives."""
        if self.ranks == 1:
            return 0.0
        device = self.hardware.device
        rate = device.gather_bytes_per_second or device.exchange_bytes_per_second
        inside = nbytes * (self.ranks - 1) / self.ranks / rate
        if self.nodes == 1:
            return inside
        between = nbytes * (self.nodes - 1) / self.nodes / self._node_bytes_per_second
        return max(inside, between) + steps * self._latency

    def reduced(self, nbytes: float, steps: int = 1) -> float:
        """Seconds of an all-reduce: a reduce-scatter and an all-gather."""
        return 2 * self.gathered(nbytes, steps)

    def exchanged(self, nbytes: float, ranks: int | None = None, steps: int = 1) -> float:
        """Seconds of an all-to-all in which each rank sends `nbytes`, an equal part to each of `ranks` neighbours.

        Args:
            nbytes: of one rank, to itself included.
            ranks: that take part, on as few nodes as hold them; None: all.
            steps: collectives that it is cut into.
        """
        ranks = self.ranks if ranks is None else ranks
        here = min(ranks, self.gpus_per_node)
        inside = nbytes * max(0, here - 1) / ranks / self.hardware.device.exchange_bytes_per_second
        if ranks <= self.gpus_per_node:
            return inside
        between = self.to_other_nodes(nbytes, ranks) * self.gpus_per_node / self._node_bytes_per_second
        return max(inside, between) + steps * self._latency

    def to_other_nodes(self, nbytes: float, ranks: int | None = None) -> float:
        """Of what each rank sends in an all-to-all, the bytes that leave its node."""
        ranks = self.ranks if ranks is None else ranks
        return nbytes * max(0, ranks - self.gpus_per_node) / ranks

    @property
    def _node_bytes_per_second(self) -> float:
        assert self.network is not None
        return self.network.bytes_per_second * (self.gpus_per_node if self.network.ports == "gpu" else 1)

    @property
    def _latency(self) -> float:
        return self.network.latency_seconds if self.network else 0.0
