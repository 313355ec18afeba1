"""The parts of a training job."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from model.census import take_census
from offload.addresses.hashing import AddressBook
from offload.tables import WindowTooSmall
from train.build import build_engine
from train.checkpoint.checkpoints import Checkpoints, Resumed
from train.checkpoint.identity import Identity
from train.checkpoint.listing import CHECKPOINTS
from train.config.job import JobConfig
from train.data.blend import Blend, check_all
from train.errors import UserError
from train.loaders import build_held_out, build_loader
from train.origin import require_memory, require_tokenizer
from train.tables import address_book, open_tables, table_bytes
from train.taken_folder import TakenFolder

_BACKBONE_BYTES = 12
"""Bytes that a checkpoint takes for each backbone parameter: fp32 weight and two moments."""


class Parts:
    """The parts of a job, built in the order in which they need each other, once its ranks have joined. Collective.

    Args:
        job: its config.
        tell: is told of each part before it is built, where that may take long.

    Raises:
        UserError: anything in the config, the data or the run's folder that the user has to change.
    """

    def __init__(self, job: JobConfig, tell: Callable[[str], None] = lambda text: None) -> None:
        self.job = job
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.folder = Path(job.run.dir) / job.run.name
        tell("reading the data")
        blend: Blend = _on_one_rank_first(self._open_data, then=self._open_data_unchecked)
        self.blend, self.store = blend, blend.store
        if job.model.vocab_size < self.store.vocab_size:
            raise UserError(
                f"model.vocab_size is {job.model.vocab_size}, but the tokenizer of the data has "
                f"{self.store.vocab_size} entries: set model.vocab_size={self.store.vocab_size}"
            )
        place = {"rank": self.rank, "world_size": self.world_size}
        self.train_loader = build_loader(job, blend, **place)
        self.held_out = build_held_out(job, blend, **place)
        self.counts = take_census(job.model)
        require_memory(self.counts.total)
        addresses = address_book(job.model, self.store)
        self.checkpoints = Checkpoints(self.folder / CHECKPOINTS, job, self._identity(addresses))
        checkpoint_bytes = table_bytes(job, addresses) + self.counts.total * _BACKBONE_BYTES
        self.taken = TakenFolder(job, self.checkpoints, checkpoint_bytes)
        if job.checkpoint.every is not None:
            self.checkpoints.probe()
        tell(f"building the model: {self.counts.total / 1e6:,.2f}M parameters outside the tables")
        self.engine = build_engine(job, self.world_size)
        self.table_bytes = table_bytes(job, addresses, self.engine.device)
        if addresses:
            tell(f"allocating the tables: {self.table_bytes / 2**20:,.1f} MiB in host memory")
        self.tables = open_tables(job, addresses, self.train_loader, self.engine.device, tell)

    def close(self) -> None:
        """Leaves the job's ranks. Collective.

        Not for a rank that failed: what it would wait for may need the others, which know nothing of the failure. Nor
        for a run that was interrupted: ranks differ in how far they have planned ahead.
        """
        if self.tables:
            self.tables.close()
        self.engine.close()
        dist.destroy_process_group()

    def resume(self) -> Resumed:
        """Loads the run's newest intact checkpoint, or else that of `init_from`, if any."""
        resumed = self.checkpoints.resume(self.engine, self.tables)
        start = resumed.step
        if self.taken.origin:
            require_tokenizer(self.taken.origin, self.store.tokenizer().sha256)
            self.checkpoints.begin_with(self.taken.origin, self.engine, self.tables)
        if start > self.job.train.steps:
            raise UserError(f"train.steps is {self.job.train.steps}, but {resumed.path} already has {start} steps")
        if self.tables and start < self.job.train.steps:
            # What comes later may have longer sequences.
            later = [step for step in self.train_loader.phase_starts(self.job.train.steps) if step > start]
            try:
                self.tables.check_window(start, *later)
            except WindowTooSmall as error:
                raise UserError(str(error)) from None
        return resumed

    def _open_data(self) -> Blend:
        blend = self._open_data_unchecked()
        return check_all(blend) if self.job.data.verify else blend

    def _open_data_unchecked(self) -> Blend:
        return Blend.open(self.job.data, self.job.train.global_batch_size)

    def _identity(self, addresses: AddressBook | None) -> Identity:
        fingerprint = addresses.fingerprint() if addresses else None
        model, tokenizer = self.job.model.model_dump(mode="json"), self.store.tokenizer().sha256
        return Identity(model, fingerprint, self.train_loader.identity(), tokenizer)


def _on_one_rank_first(action: Callable[[], Any], then: Callable[[], Any]) -> Any:
    """Runs `action` on local rank 0, `then` on the others: what it makes or checks is so once a machine."""
    first = int(os.environ.get("LOCAL_RANK", "0")) == 0
    result = action() if first else None
    dist.barrier()
    return result if first else then()
