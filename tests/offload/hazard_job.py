"""Jobs whose rows are chosen by hand, run under random delays: what `test_hazards.py` runs on one and on more ranks."""

import copy
import faulthandler
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.gather import gather
from offload.config import OffloadConfig
from offload.plan.plan import Tokens as MicroBatch
from offload.plan.sharding import Sharding
from offload.rows.records import RowInit
from offload.step import Step
from offload.tables import EngramTables
from tests.offload import broken_rules
from tests.offload.delays import LONGEST_S, Seen, random_delays

DIM = 5
SEED = 3
SEQUENCES = 12  # divisible by 1, 2, 3 and 4 ranks
HANGS_AFTER_S = 200

Tokens = tuple[tuple[int, ...], ...]
"""One step's token ids: SEQUENCES sequences of one length, which may be 0."""


@dataclass(frozen=True)
class Addresses:
    """Two modules with one row a token: token t reads rows t and 3t + 1, modulo the tables' sizes."""

    sizes: tuple[int, int] = (97, 61)
    num_modules: int = 2

    def num_rows(self, module: int) -> int:
        return self.sizes[module]

    def rows(self, module: int, tokens_BT: Tensor) -> Tensor:
        return ((tokens_BT * (2 * module + 1) + module) % self.sizes[module])[..., None]

    def all_rows(self, tokens_BT: Tensor, positions_BT: Tensor) -> Tensor:
        return torch.stack([self.rows(module, tokens_BT) for module in range(self.num_modules)])


@dataclass(frozen=True)
class Job:
    """What is trained on, and what happens beside it.

    Attributes:
        steps: token ids of each step.
        micro_batches: parts that a rank's sequences are trained in.
        exact: gradients that are sums of few-bit numbers: no order of additions changes a bit. Else quadratic losses.
        skipped: steps that are skipped after their gradients were reduced.
        abandoned: steps whose rows were handed out, used, and given up without a backward.
        evaluated: steps after which other rows are looked up.
        saved: steps after which the rows are saved.
        windows: depths, and spare slots beyond those of the fullest step, that the job is made for.
    """

    steps: tuple[Tokens, ...]
    micro_batches: int = 1
    exact: bool = False
    skipped: frozenset[int] = frozenset()
    abandoned: frozenset[int] = frozenset()
    evaluated: frozenset[int] = frozenset()
    saved: frozenset[int] = frozenset()
    windows: tuple[tuple[int, int], ...] = ()
    learning_rates: tuple[float, ...] = (0.01, 0.02, 0.005)
    addresses: Addresses = Addresses()

    def batches(self, step: int, rank: int, world_size: int) -> list[MicroBatch]:
        tokens = torch.tensor(self.steps[step % len(self.steps)], dtype=torch.int64).view(SEQUENCES, -1)
        mine = tokens[rank * SEQUENCES // world_size : (rank + 1) * SEQUENCES // world_size]
        parts = mine.chunk(self.micro_batches)
        return [MicroBatch(part, torch.arange(part.shape[1]).expand_as(part)) for part in parts]

    def loss(self, rows_ND: Tensor, tokens_BT: Tensor, module: int) -> Tensor:
        if not self.exact:
            # Multiples of one number would add up to the same bits in almost any order.
            weights_N1 = torch.arange(1.0, len(rows_ND) + 1).sqrt()[:, None]
            return (weights_N1 * (rows_ND + 0.1 * (module + 1)) ** 2).sum()
        pattern_ND = (5 * tokens_BT.flatten()[:, None] + 3 * torch.arange(DIM) + module) % 7 - 3
        return (rows_ND * pattern_ND / 8).sum()

    def most_rows(self, world_size: int) -> int:
        """Rows that one step needs of one rank at most: the smallest window there may be."""
        sharding = Sharding(self.addresses.sizes, world_size)
        used = [torch.tensor(tokens, dtype=torch.int64) for tokens in self.steps]
        counts = [[sharding.counts(m, self.addresses.rows(m, tokens).unique()) for m in range(2)] for tokens in used]
        return max(int(sum(of_step).max()) for of_step in counts)


@dataclass(frozen=True)
class Image:
    """What a checkpoint keeps: rows by job-wide id, bit by bit, and the optimizer's state."""

    rows: dict[int, bytes]
    state: dict
    done: int


@dataclass(frozen=True)
class Outcome:
    """What a rank saw.

    Attributes:
        losses, norms: of each step; the looked-up rows' sum is added to an evaluated step's loss.
        rows: its updated rows at the end, bit by bit.
        images: what was saved, by step; first, what the case started from, if that was an image.
        leaks: what was left behind in counters and queues: must be empty.
        seen: what the delays provoked.
    """

    losses: list[float]
    norms: list[float]
    rows: dict[int, bytes]
    images: list[Image] = field(default_factory=list)
    leaks: dict[str, int] = field(default_factory=dict)
    seen: Seen = field(default_factory=Seen)

    @property
    def bits(self) -> tuple[list[float], list[float], dict[int, bytes]]:
        """All that must not depend on window, depth and delays."""
        return self.losses, self.norms, self.rows


@dataclass(frozen=True)
class Case:
    """A job under a config and seeded delays.

    Attributes:
        image: what to start from, if not from the start.
        broken: the rule of `broken_rules` that is broken, if any.
        longest_write_back_s: the longest pause of a write-back.
    """

    job: Job
    config: OffloadConfig
    seed: int = 0
    image: Image | None = None
    broken: str | None = None
    longest_write_back_s: float = LONGEST_S


@dataclass(frozen=True)
class Ranks:
    """The ranks that a case runs on.

    Attributes:
        rank, size: this process's place among them, and how many there are.
        group, host_group: theirs, for the training loop and for the planner; None without other processes.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    host_group: dist.ProcessGroup | None = None


_ranks: Ranks | None = None


def ranks() -> Ranks:
    """Those of `running_on`, else all processes. Groups are made once: making one takes longer than a case."""
    global _ranks
    if _ranks is None:
        _ranks = Ranks()
        if dist.is_initialized():
            _ranks = Ranks(dist.get_rank(), dist.get_world_size(), None, dist.new_group(backend="gloo"))
    return _ranks


@contextmanager
def running_on(some: Ranks) -> Iterator[None]:
    """Runs cases on some of the processes."""
    global _ranks
    before, _ranks = _ranks, some
    yield
    _ranks = before


def rank_and_size() -> tuple[int, int]:
    return ranks().rank, ranks().size


def open_tables(case: Case) -> EngramTables:
    rank, world_size = rank_and_size()
    tables = EngramTables(
        case.config,
        case.job.addresses,
        dim=DIM,
        init=RowInit(SEED, 0.02),
        batches=lambda step: case.job.batches(step, rank, world_size),
        num_steps=len(case.job.steps),
        group=ranks().group,
        host_group=ranks().host_group,
    )
    if case.image is not None:
        tables.load_optimizer_state(case.image.state)
        ids = torch.tensor(list(case.image.rows), dtype=torch.int64)
        records = torch.frombuffer(bytearray(b"".join(case.image.rows.values())), dtype=torch.float32)
        tables.load_rows(ids, records.view(len(ids), -1))
    return tables


def use_rows(tables: EngramTables, job: Job, number: int) -> tuple[Step, list[Tensor]]:
    """Begins a step and computes the loss of each micro-batch."""
    step = tables.begin(number)
    losses = [
        sum(
            (
                job.loss(gather(leaf, index), batch.tokens_BT, module)
                for module, (leaf, index) in enumerate(step.rows.of(place))
            ),
            start=torch.zeros(()),
        )
        for place, batch in enumerate(step.batches)
    ]
    return step, losses


def train_step(tables: EngramTables, job: Job, number: int) -> tuple[float, float]:
    """One step; returns this rank's loss and the gradient's squared norm."""
    _, world_size = rank_and_size()
    step, losses = use_rows(tables, job, number)
    loss, norm_squared = float(sum(losses).detach()), 0.0
    if number in job.abandoned:
        step.skip()
        return loss, norm_squared
    for part in losses:
        (part * world_size).backward()
    norm_squared = float(step.reduce())
    if number in job.skipped:
        step.skip()
    else:
        step.apply(lr=job.learning_rates[number % len(job.learning_rates)], gradient_scale=0.5)
    return loss, norm_squared


def look_up(tables: EngramTables, job: Job, step: int) -> float:
    """Looks other rows up: those of a step to come, and of the one that was just trained on."""
    batches = [batch for other in (step, step + 3) for batch in job.batches(other, *rank_and_size())]
    return float(sum(leaf.double().sum() for leaf in tables.look_up(batches).values))


def saved_rows(tables: EngramTables) -> dict[int, bytes]:
    rows: dict[int, bytes] = {}
    for ids, records in tables.updated_rows(piece_bytes=1000):
        rows |= {row: record.numpy().tobytes() for row, record in zip(ids.tolist(), records, strict=True)}
    return rows


def leaks(tables: EngramTables) -> dict[str, int]:
    """What finished steps must not leave behind, counted after a flush; only what is not 0."""
    store = tables._shard.store
    counts = {"plans": len(tables._planner._plans)}
    if hasattr(store, "_directory"):
        directory = store._directory
        held = sum(len(slots) for _, slots in directory._uses)
        counts |= {
            "admissions": len(store._admissions.admitted),
            "writebacks": len(store._admissions.writebacks),
            "slots in copies": int(directory._writes.sum()),
            "dirty slots": int(directory.dirty.sum()),
            "uses remembered beyond the window's size": max(0, held - 4 * len(directory.state)),
        }
    return {name: count for name, count in counts.items() if count}


def run_case(case: Case) -> Outcome:
    """Trains a case to its end on this rank."""
    job, results, images = case.job, [], []
    # The delays come last: they count what really happens.
    broken = getattr(broken_rules, case.broken)() if case.broken else nullcontext()
    seed = 1000 * case.seed + rank_and_size()[0]
    with broken, random_delays(seed, longest_write_back_s=case.longest_write_back_s) as seen:
        tables = open_tables(case)
        try:
            if case.image:
                images.append(Image(saved_rows(tables), {}, case.image.done))
            for step in range(case.image.done if case.image else 0, len(job.steps)):
                loss, norm_squared = train_step(tables, job, step)
                if step in job.evaluated:
                    loss += look_up(tables, job, step)
                if step in job.saved:
                    images.append(Image(saved_rows(tables), copy.deepcopy(tables.optimizer_state()), step + 1))
                results.append((loss, norm_squared))
            rows, left = saved_rows(tables), leaks(tables)
        finally:
            tables.close()
    losses, norms = map(list, zip(*results, strict=True)) if results else ([], [])
    return Outcome(losses, norms, rows, images, left, seen)


def run_cases_by_size(cases: Mapping[int, Sequence[Case]]) -> dict[tuple[int, int], Outcome]:
    """Runs cases for each number of ranks, on processes of which there are enough; every process must call it.

    As many cases run at a time as there are ranks for. A rank that hangs is ended, with its threads' tracebacks.

    Returns:
        What this process saw, by number of ranks and by the case's place among the cases for that number.
    """
    faulthandler.dump_traceback_later(HANGS_AFTER_S, exit=True)
    try:
        teams = {size: _teams(size) for size in cases}
        outcomes: dict[tuple[int, int], Outcome] = {}
        for size, (mine, number, count) in teams.items():
            if mine is not None:
                with running_on(mine):
                    places = range(number, len(cases[size]), count)
                    outcomes |= {(size, place): run_case(cases[size][place]) for place in places}
        return outcomes
    finally:
        faulthandler.cancel_dump_traceback_later()


def _teams(size: int) -> tuple[Ranks | None, int, int]:
    """Splits all processes into teams; returns this one's, its number, and how many teams there are."""
    rank, count = dist.get_rank(), dist.get_world_size() // size
    members = [range(team * size, (team + 1) * size) for team in range(count)]
    # Every process must take part in the making of every group.
    groups = [[dist.new_group(list(team), backend="gloo") for _ in range(2)] for team in members]
    number = rank // size
    return (Ranks(rank % size, size, *groups[number]) if number < count else None), number, count


def merged(parts: Sequence[dict[int, bytes]]) -> dict[int, bytes]:
    """The rows of all ranks; no row may have two owners."""
    rows = dict(itertools.chain.from_iterable(part.items() for part in parts))
    assert len(rows) == sum(len(part) for part in parts), "a row has two owners"
    return rows
