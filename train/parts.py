"""The parts of a training job, and what is done with them before the first step and after the last."""

import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from model.census import take_census
from model.config import ModelConfig
from offload.addresses.hashing import AddressBook
from offload.tables import EngramTables, WindowTooSmall
from train.build import build_engine
from train.checkpoint.checkpoints import Checkpoints, Resumed
from train.checkpoint.identity import Identity
from train.checkpoint.listing import CHECKPOINTS, checkpoints_in
from train.checkpoint.together import on_rank_0
from train.config.file import dump
from train.config.job import JobConfig, anchored
from train.config.yaml_text import render
from train.data.batches.packing import IGNORED
from train.data.blend import Blend, check_all
from train.errors import UserError
from train.evaluation import Evaluation, batches
from train.files import new_file
from train.loaders import build_held_out, build_loader
from train.origin import choose_origin, require_disk, require_memory, require_tokenizer
from train.report.metrics import METRICS_FILE, read_metrics
from train.report.skipped import SKIPPED_FILE
from train.report.summary import SUMMARY_FILE, SourceSummary, Summary
from train.run_folder import BASE_FILE, CONFIG_FILE, LOG_FILE, require_writable
from train.run_lock import lock_run
from train.tables import address_book, open_tables, table_bytes
from train.use.sampling import continue_texts

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
        self.saved_table_bytes = table_bytes(job, addresses)
        self.origin = self._open_folder()
        if job.checkpoint.every is not None:
            self.checkpoints.probe()
        tell(f"building the model: {self.counts.total / 1e6:,.2f}M parameters outside the tables")
        self.engine = build_engine(job, self.world_size)
        self.table_bytes = table_bytes(job, addresses, self.engine.device)
        if addresses:
            tell(f"allocating the tables: {self.table_bytes / 2**20:,.1f} MiB in host memory")
        self.tables = open_tables(job, addresses, self.train_loader, self.engine.device, tell)

    @property
    def leads(self) -> bool:
        """Whether this rank is the one that looks after the run's folder: rank 0, or one of each node."""
        return self.checkpoints.nodes.leads

    def record_config(self, base: tuple[str, dict[str, Any]] | None = None) -> None:
        """Writes config, `base` and tokenizer into the run's folder, once they are known to fit what is there."""
        if self.leads:
            # A run that goes on from its own config keeps the base that it had.
            if base is not None and Path(base[0]).resolve() != (self.folder / CONFIG_FILE).resolve():
                with new_file(self.folder / BASE_FILE) as partial:
                    partial.write_text(render({"name": base[0], "values": anchored(base[1])}), encoding="utf-8")
            dump(self.job.model_copy(update={"data": self.job.data.anchored()}), self.folder / CONFIG_FILE)
            self.store.tokenizer().save(self.folder)

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
        if self.origin:
            require_tokenizer(self.origin, self.store.tokenizer().sha256)
            self.checkpoints.begin_with(self.origin, self.engine, self.tables)
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

    def sample(self) -> list[str]:
        """Continues the config's prompts."""
        return continue_texts(
            self.engine,
            self.tables,
            self.store.tokenizer(),
            self.job.eval.prompts if self.job.eval.sample_tokens else [],
            num_tokens=self.job.eval.sample_tokens,
            temperature=self.job.eval.temperature,
            max_length=self.job.data.longest,
            seed=self.job.train.seed,
        )

    def summarise(
        self,
        found: Evaluation | None,
        samples: list[str],
        rows_moved: int,
        *,
        tokens: int,
        start: int,
        look_ahead: int | None,
    ) -> Summary:
        """The outcome of the run, which resumed at step `start`; `look_ahead` is what it chose itself."""
        job, tables = self.job, self.tables
        windowed = tables is not None and job.offload.mode == "window"
        speeds = [r["tokens_per_s"] for r in read_metrics(self.folder / METRICS_FILE) if r["step"] > start]
        summary = Summary(
            run=str(self.folder),
            steps=job.train.steps,
            tokens=tokens,
            val_loss=found.loss if found else None,
            val_bits_per_byte=found.bits_per_byte if found else None,
            unigram_entropy=self._unigram_entropy(),
            parameters=self.counts.total + _table_parameters(tables),
            active_parameters=self.counts.active + _active_table_parameters(job.model),
            table_parameters=_table_parameters(tables),
            table_bytes=self.table_bytes,
            window_bytes=tables.window_bytes * self.world_size if tables and windowed else None,
            rows_moved=rows_moved,
            tokens_per_s=statistics.median(speeds) if speeds else None,
            samples=samples,
            init_from=job.checkpoint.init_from,
            look_ahead=look_ahead,
            vocab_size=job.model.vocab_size,
            sources=self._sources(found),
        )
        return summary if start < job.train.steps else summary.kept(self.folder)

    def _unigram_entropy(self) -> float | None:
        # Of the very tokens that were evaluated, by all ranks.
        found = []
        for source, (_, share, loader) in enumerate(build_held_out(self.job, self.blend, rank=0, world_size=1)):
            labels = [batch.labels_BT.flatten() for batch in batches(loader, self.job.eval.sequences)]
            if share and any(bool((part != IGNORED).any()) for part in labels):
                found.append((share, self.train_loader.unigram_entropy(torch.cat(labels), source=source)))
        if len(found) < 2:
            return found[0][1] if found else None
        return sum(share * entropy for share, entropy in found) / sum(share for share, _ in found)

    def _sources(self, found: Evaluation | None) -> dict[str, SourceSummary]:
        """What the run has of each source of a mixture; empty without one."""
        if len(self.blend.sources) == 1:
            return {}
        validated = found.by_source if found else {}
        return {
            name: SourceSummary(
                seen.tokens,
                seen.epochs,
                validated[name].loss if name in validated else None,
                validated[name].bits_per_byte if name in validated else None,
            )
            for name, seen in self.train_loader.seen(self.job.train.steps).items()
        }

    def _open_data(self) -> Blend:
        blend = self._open_data_unchecked()
        return check_all(blend) if self.job.data.verify else blend

    def _open_data_unchecked(self) -> Blend:
        return Blend.open(self.job.data, self.job.train.global_batch_size)

    def _identity(self, addresses: AddressBook | None) -> Identity:
        fingerprint = addresses.fingerprint() if addresses else None
        model, tokenizer = self.job.model.model_dump(mode="json"), self.store.tokenizer().sha256
        return Identity(model, fingerprint, self.train_loader.identity(), tokenizer)

    def _open_folder(self) -> Path | None:
        """Takes the folder, if its checkpoints are what the config expects; returns the one that the run begins with.

        Collective: rank 0's view of the folder decides, or those of all nodes.
        """
        nodes = self.checkpoints.nodes
        found = nodes.on_leaders(lambda: checkpoints_in(self.checkpoints.folder))
        origin = on_rank_0(lambda: choose_origin(self.job, self.checkpoints.folder, max(found.values(), key=len)))
        nodes.on_leaders(lambda: self._take_folder(len(found[self.rank])))
        return origin

    def _take_folder(self, there: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock_run(self.folder)
        require_writable(self.folder, LOG_FILE, SKIPPED_FILE, SUMMARY_FILE)
        ranks_here = len(self.checkpoints.nodes.beside(self.rank))
        whole = self.saved_table_bytes + self.counts.total * _BACKBONE_BYTES
        require_disk(self.job, self.folder, whole * ranks_here // self.world_size, there)


def _on_one_rank_first(action: Callable[[], Any], then: Callable[[], Any]) -> Any:
    """Runs `action` on local rank 0, `then` on the others: what it makes or checks is so once a machine."""
    first = int(os.environ.get("LOCAL_RANK", "0")) == 0
    result = action() if first else None
    dist.barrier()
    return result if first else then()


def _table_parameters(tables: EngramTables | None) -> int:
    return tables.num_parameters if tables else 0


def _active_table_parameters(model: ModelConfig) -> int:
    return len(model.engram.layers) * model.engram.memory_width if model.engram else 0
