"""What is emulated of a job: one of its ranks, or a part of it, with its real lookups; planned once for all runs."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.census import take_census
from model.flops import flops_per_token
from offload.addresses.compression import identity_vocabulary
from offload.addresses.hashing import AddressBook
from offload.plan.plan import Plan
from offload.rows.records import RecordLayout
from tests.emulation.clock import Simulation
from tests.emulation.hardware import Hardware
from tests.emulation.network import Size
from tests.model.launches import launches
from train.config.job import JobConfig
from train.data.batches.loader import Batch, Loader
from train.data.open import open_data
from train.tables import address_book, addresses_of

_ROW_DIM = 1
"""Of the emulated rows: what they weigh on the bus is counted with their real width."""


@dataclass(frozen=True)
class Part:
    """Which part of a job is emulated.

    A rank of several has its own micro-batches and its share of the rows; as many lookups of other ranks meet its rows
    as lookups of its own meet theirs. A step of which 1 / `scale` is emulated has so many times fewer micro-batches
    (lookups, rows, slots) and a backbone's update so many times shorter; its times are multiplied again in reports.
    """

    ranks: int = 1
    scale: int = 1


class Workload:
    """The emulated part of a job.

    Args:
        job: the whole.
        part: of it.
        hardware: what it would run on.

    Attributes:
        record_bytes, packed_bytes: of a record on its way by kernels, and without padding.
        row_bytes: of a row's weights in fp32.
        text: where the tokens come from.

    Raises:
        ValueError: the job has no Engram tables, or does not divide.
    """

    def __init__(self, job: JobConfig, part: Part, hardware: Hardware) -> None:
        if job.model.engram is None:
            raise ValueError(f"{job.run.name} has no Engram tables: there is nothing to move")
        self.part = part
        sequences, rest = divmod(job.train.global_batch_size, part.ranks * part.scale)
        if rest or sequences % job.train.micro_batch_size:
            raise ValueError(
                f"train.global_batch_size: {job.train.global_batch_size} sequences do not divide into {part.scale} "
                f"parts of {part.ranks} ranks in micro-batches of {job.train.micro_batch_size}"
            )
        layout = RecordLayout.of(job.model.engram.row_dim, job.offload.optimizer, job.offload.row_dtype)
        self.record_bytes = layout.stride_bytes(torch.device("cuda"))
        self.packed_bytes = layout.bytes
        self.row_bytes = 4 * job.model.engram.row_dim
        self.size = _size(job, part, sequences // job.train.micro_batch_size, hardware)
        self.job = _narrowed(job, part, sequences)
        self.text, self.addresses, self._draw = _tokens(self.job)
        self._batches: dict[int, Sequence[Batch]] = {}
        self._plans: dict[int, tuple[Plan, float]] = {}

    def batches(self, step: int) -> Sequence[Batch]:
        """The micro-batches of a step; the same objects each time."""
        if step not in self._batches:
            self._batches[step] = self._draw(step)
        return self._batches[step]

    def planned(self, simulation: Simulation, make_plan: Callable[..., Plan]) -> Callable[..., Plan]:
        """`make_plan`, which does its work once: later it takes as long as it took then."""

        def planned(batches: Sequence[Batch], *args: Any) -> Plan:
            if id(batches) not in self._plans:
                with simulation.uncharged():
                    started = time.thread_time()
                    plan = make_plan(batches, *args)
                    self._plans[id(batches)] = plan, time.thread_time() - started
            plan, seconds = self._plans[id(batches)]
            simulation.compute(seconds)
            return replace(plan)

        return planned


def _size(job: JobConfig, part: Part, micro_batches: int, hardware: Hardware) -> Size:
    assert job.model.engram is not None
    tokens = job.train.micro_batch_size * job.data.sequence_length
    census = take_census(job.model)
    return Size(
        micro_batches,
        launches(job.model, tokens).total(),
        tokens * flops_per_token(job.model, census, job.data.sequence_length).total,
        hardware.backbone.optimizer_bytes * census.total / part.ranks / part.scale,
        min(job.model.engram.layers) / job.model.num_layers,
    )


def _narrowed(job: JobConfig, part: Part, sequences: int) -> JobConfig:
    """The part as a job of its own."""
    assert job.model.engram is not None
    rows = max(1, job.model.engram.rows_per_head // (part.ranks * part.scale))
    engram = job.model.engram.model_copy(update={"row_dim": _ROW_DIM, "rows_per_head": rows})
    slots = max(1, job.offload.window_rows // part.scale)
    return job.model_copy(
        update={
            "model": job.model.model_copy(update={"engram": engram}),
            "train": job.train.model_copy(update={"global_batch_size": sequences}),
            "offload": job.offload.model_copy(update={"window_rows": slots}),
        }
    )


def _tokens(job: JobConfig) -> tuple[str, AddressBook, Callable[[int], Sequence[Batch]]]:
    """The job's text, if it is here, else drawn tokens; and the addresses of its rows."""
    if job.data.path is not None and not Path(job.data.path).exists():
        return "drawn, Zipf(1)", _drawn_addresses(job), lambda step: _drawn(job, step)
    store, train = open_data(job.data), job.train
    loader = Loader(
        store,
        split="train",
        sequence_length=job.data.sequence_length,
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.micro_batch_size,
        seed=train.seed,
    )
    addresses = address_book(job.model, store)
    assert addresses is not None
    return job.data.path or "default corpus", addresses, loader.batch


def _drawn_addresses(job: JobConfig) -> AddressBook:
    engram = job.model.engram
    assert engram is not None
    return addresses_of(engram, identity_vocabulary(job.model.vocab_size, pad_id=engram.pad_id or 0))


def _drawn(job: JobConfig, step: int) -> list[Batch]:
    """Independent tokens: text repeats its n-grams more often."""
    sequences, length = job.train.micro_batch_size, job.data.sequence_length
    share_of = np.cumsum(1 / np.arange(1, job.model.vocab_size + 1))
    drawn = np.random.default_rng((job.train.seed, step)).random((job.train.global_batch_size, length))
    tokens = torch.from_numpy(np.searchsorted(share_of, drawn * share_of[-1]))
    positions_BT = torch.arange(length).expand(sequences, length)
    return [Batch(tokens_BT, tokens_BT, positions_BT) for tokens_BT in tokens.split(sequences)]
