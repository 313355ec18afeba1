"""A small training job on the tables alone, for tests: random tokens, a quadratic loss, real ranks."""

import hashlib
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.gather import gather
from offload.config import OffloadConfig
from offload.plan.plan import Tokens
from offload.rows.records import RowInit
from offload.tables import EngramTables

DIM = 6
SLOTS = 3
VOCABULARY = 40


class Addresses:
    """Two modules with tables of uneven size; rows are a plain function of token and slot."""

    num_modules = 2

    def num_rows(self, module: int) -> int:
        return (97, 61)[module]

    def check(self, tokens_BT: Tensor) -> None:
        """There are rows for every token id."""

    def on(self, device: torch.device) -> "Addresses":
        return self

    def rows(self, module: int, tokens_BT: Tensor, positions_BT: Tensor) -> Tensor:
        slots_S = torch.arange(SLOTS, device=tokens_BT.device)
        mixed = (tokens_BT + 7 * positions_BT.clamp(max=1))[..., None] * (slots_S + 3) + module
        return mixed % self.num_rows(module)

    def all_rows(self, tokens_BT: Tensor, positions_BT: Tensor) -> Tensor:
        return torch.stack([self.rows(module, tokens_BT, positions_BT) for module in range(self.num_modules)])


@dataclass(frozen=True)
class Job:
    """What a job does; global batches do not depend on the world size."""

    steps: int = 12
    global_batch: int = 4
    micro_batch: int = 2
    skipped: tuple[int, ...] = ()
    evaluate: bool = False
    learning_rates: tuple[float, ...] = (0.01, 0.02, 0.005)
    seed: int = 5
    device: str = "cpu"
    window: dict = field(default_factory=dict)

    def batches(self, step: int, rank: int, world_size: int) -> list[Tokens]:
        generator = torch.Generator().manual_seed(1000 * self.seed + step)
        # A narrow, moving range of ids: rows return after one, a few, or many steps.
        low = int(torch.randint(0, VOCABULARY - 8, (1,), generator=generator))
        tokens = torch.randint(low, low + 8, (self.global_batch, 5), generator=generator)
        positions = torch.arange(5).expand_as(tokens)
        mine = slice(rank * self.global_batch // world_size, (rank + 1) * self.global_batch // world_size)
        parts = zip(tokens[mine].split(self.micro_batch), positions[mine].split(self.micro_batch), strict=True)
        return [Tokens(*part) for part in parts]


@dataclass(frozen=True)
class Outcome:
    """What a rank saw: losses, the digest of its updated rows, and how many rows travelled or were drawn."""

    losses: list[float]
    norms: list[float]
    rows: dict[int, list[float]]
    fetched: int
    drawn: int
    written_back: int

    @property
    def digest(self) -> str:
        return hashlib.sha256(repr((self.losses, self.norms, self.rows)).encode()).hexdigest()


def open_tables(job: Job, config: OffloadConfig) -> EngramTables:
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    host_group = dist.new_group(backend="gloo") if world_size > 1 else None
    return EngramTables(
        config,
        Addresses(),
        dim=DIM,
        init=RowInit(job.seed, 0.02),
        batches=lambda step: job.batches(step, rank, world_size),
        num_steps=job.steps,
        host_group=host_group,
        device=job.device,
    )


def train_step(tables: EngramTables, job: Job, step: int) -> tuple[float, float]:
    """One step; returns this rank's loss and the gradient's squared norm."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    begun = tables.begin(step)
    total = 0.0
    for place in range(len(begun.batches)):
        loss = sum(
            ((gather(leaf, index) + 0.1 * (module + 1)) ** 2).sum()
            for module, (leaf, index) in enumerate(begun.rows.of(place))
        )
        (loss * world_size / 10).backward()
        total += float(loss.detach())
    norm_squared = float(begun.reduce())
    if step in job.skipped:
        begun.skip()
    else:
        begun.apply(lr=job.learning_rates[step % len(job.learning_rates)], gradient_scale=0.5)
    if job.evaluate and step % 3 == 0:
        seen = tables.look_up(job.batches(step + 100, rank, world_size))
        total += float(sum(leaf.sum() for leaf in seen.values))
    return total, norm_squared


def run_job(job: Job, config: OffloadConfig, stop: int | None = None) -> Outcome:
    """Trains up to `stop` (default: all steps) on this rank."""
    tables = open_tables(job, config)
    try:
        results = [train_step(tables, job, step) for step in range(job.steps if stop is None else stop)]
        rows = {}
        for ids, records in tables.updated_rows(piece_bytes=700):
            rows.update(zip(ids.tolist(), records.view(torch.int32).tolist(), strict=True))
        traffic = tables.take_traffic()
    finally:
        tables.close()
    losses, norms = zip(*results, strict=True)
    return Outcome(list(losses), list(norms), rows, traffic.fetched, traffic.drawn, traffic.written_back)


def run_jobs(jobs: list[tuple[Job, OffloadConfig]]) -> list[Outcome]:
    """Several jobs one after another on the same ranks."""
    return [run_job(job, config) for job, config in jobs]
