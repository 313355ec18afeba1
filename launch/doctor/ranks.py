"""Between all ranks of a job: do exchanges work, how fast, which pair of hosts is the slowest, do clocks agree."""

import socket
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from launch.doctor.check import Check, bound

_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}
_TIMES = 3
_SKEW_S = 1.0
_SLOW = 0.5
"""Share of the median pair's rate below which a pair is worth a warning."""


@dataclass(frozen=True)
class Pair:
    """Two hosts, and the bytes per second that each sent the other while the other sent as many."""

    hosts: tuple[str, str]
    rate: float


def between_ranks(device: torch.device, folder: Path, local_rank: int, *, local: bool = False) -> list[Check]:
    """Checks that all ranks make together. Collective; the findings are the same on all of them.

    With `local`, each host keeps its own part of the run's folder.
    """
    places: list[tuple[str, int]] = [("", 0)] * dist.get_world_size()
    dist.all_gather_object(places, (socket.gethostname(), local_rank))
    firsts = {host: rank for rank, (host, number) in reversed([*enumerate(places)]) if number == 0}
    own = Check("run folder", "ok", f"{folder} is each host's own (run.local_checkpoints)")
    checks = [_clocks(places), own if local else _shared(folder, places)]
    words = _BYTES[device.type] // 4 // len(places) * len(places)
    sent, got = torch.ones(words, device=device), torch.empty(words, device=device)

    def exchange() -> None:
        dist.all_to_all_single(got, sent)

    checks.append(_rate("all-reduce", lambda: dist.all_reduce(got), device, words))
    checks.append(_rate("all-to-all", exchange, device, words))
    return checks + _pairs(measure_pairs(firsts, sent, got))


def measure_pairs(firsts: dict[str, int], sent: torch.Tensor, got: torch.Tensor) -> list[Pair]:
    """Rates between all pairs of hosts, in rounds in which each host has one partner. Collective.

    Args:
        firsts: for each host the rank that sends.
        sent: what it sends, fp32 [N].
        got: where it receives, fp32 [N].
    """
    mine: list[Pair] = []
    me = {rank: host for host, rank in firsts.items()}.get(dist.get_rank())
    for pairs in rounds(sorted(firsts)):
        dist.barrier()
        for pair in pairs:
            if me in pair:
                other = firsts[pair[1] if me == pair[0] else pair[0]]
                rate = _swap_rate(other, sent, got)
                mine += [Pair(pair, rate)] if me == pair[0] else []
    found: list[list[Pair]] = [[]] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return [pair for each in found for pair in each]


def rounds(hosts: Sequence[str]) -> Iterator[list[tuple[str, str]]]:
    """All pairs of hosts, in rounds in which no host occurs twice (the circle method)."""
    ring: list[str | None] = [*hosts, *([None] if len(hosts) % 2 else [])]
    for _ in range(len(ring) - 1):
        half = len(ring) // 2
        facing = zip(ring[:half], reversed(ring[half:]), strict=True)
        yield [(one, other) for one, other in facing if one is not None and other is not None]
        ring = [ring[0], ring[-1], *ring[1:-1]]


def _swap_rate(other: int, sent: torch.Tensor, got: torch.Tensor) -> float:
    def swap() -> None:
        for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, sent, other), dist.P2POp(dist.irecv, got, other)]):
            work.wait()

    return sent.nbytes / _seconds(swap, sent.device)


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    """Seconds of the fastest of several runs; the first, in which connections are made, does not count."""
    times = []
    for _ in range(_TIMES + 1):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times[1:])


def _rate(name: str, work: Callable[[], object], device: torch.device, words: int) -> Check:
    def one() -> None:
        work()

    seconds = torch.tensor(_seconds(one, device), device=device)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    rate = words * 4 / seconds.item()
    return Check(
        name, "ok", f"{rate / 1e9:.2f} GB/s a rank, {words * 4 >> 20} MiB between {dist.get_world_size()} ranks"
    )


def _pairs(pairs: list[Pair]) -> list[Check]:
    if not pairs:
        return []
    slowest, median = min(pairs, key=lambda pair: pair.rate), statistics.median(pair.rate for pair in pairs)
    found = (
        f"slowest is {' - '.join(slowest.hosts)} with {slowest.rate / 1e9:.2f} GB/s each way, median {median / 1e9:.2f}"
    )
    return [bound("pairs of hosts", "warning", slowest.rate >= _SLOW * median, found, "look at these hosts' link")]


def _clocks(places: list[tuple[str, int]]) -> Check:
    dist.barrier()
    times = [0.0] * len(places)
    dist.all_gather_object(times, time.time())
    late, early = times.index(max(times)), times.index(min(times))
    skew = times[late] - times[early]
    found = f"within {skew:.2f} s of each other"
    if skew > _SKEW_S:
        found = f"{places[late][0]} is {skew:.1f} s ahead of {places[early][0]}"
    return bound(
        "clocks", "warning", skew <= _SKEW_S, found, "run an NTP client: logs and the order of failures go by them"
    )


def _shared(folder: Path, places: list[tuple[str, int]]) -> Check:
    """Whether all hosts see a file that rank 0 makes in the run's folder."""
    probe = folder / f".doctor-{socket.gethostname()}"
    names = [probe.name]
    dist.broadcast_object_list(names)
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
    dist.barrier()
    sees = [False] * len(places)
    dist.all_gather_object(sees, (folder / names[0]).exists())
    if dist.get_rank() == 0:
        probe.unlink()
    blind = sorted({host for (host, _), seen in zip(places, sees, strict=True) if not seen})
    found = f"{folder} is another one on {', '.join(blind)}" if blind else f"{folder} is the same on all hosts"
    return bound(
        "run folder",
        "missing",
        not blind,
        found,
        "set run.dir to a folder that all hosts share, or run.local_checkpoints=true",
    )
