"""Runs a training job on this rank, from its start to its summary."""

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from train.checkpoint.checkpoints import Resumed
from train.checkpoint.listing import checkpoints_in
from train.config.job import JobConfig
from train.hardware import describe_machine
from train.history import bring_history
from train.memory import memory_use
from train.outcome import continued_prompts, summarise
from train.parts import Parts
from train.ranks import host_group, job_store, join_ranks
from train.report.notes import notes
from train.report.profile import StepProfiler
from train.report.reporter import Reporter
from train.report.start import tell_start
from train.report.summary import Summary
from train.run_state import StateRecord
from train.trainer import Trainer
from train.watch.flight_recorder import record_operations
from train.watch.heartbeat import forget_beats
from train.watch.stop import StopSignals
from train.watch.watch import RunWatch


def _leave(error: BaseException) -> None:
    print(f"Error: {error}", file=sys.stderr, flush=True)
    os._exit(1)


def train(
    job: JobConfig,
    leave: Callable[[BaseException], None] = _leave,
    *,
    base: tuple[str, dict[str, Any]] | None = None,
) -> Summary | None:
    """Trains `job` from its newest checkpoint, or from nothing, to its last step. Collective.

    The ranks are those that the environment names (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT). From the
    first step on, signals that ask this process to end are obeyed between two steps.

    Args:
        job: its config.
        base: what the config was made from (`train.config.file.base_of`), for the report; None if that is not known.
        leave: reports an error and ends this process, from any thread: this is how a rank that is stuck ends.

    Returns:
        The summary on rank 0; None on the others.

    Raises:
        UserError: anything in the config, the data or the run's folder that the user has to change.
        Interrupted: on all ranks, by a signal that one of them received.
        OSError: a file cannot be written.
    """
    tell_start("waiting for all ranks")
    if torch.cuda.is_available() if job.train.flight_recorder is None else job.train.flight_recorder:
        record_operations(Path(job.run.dir) / job.run.name)
    join_ranks(job.launch.timeout_s)
    parts = Parts(job, tell_start)
    if parts.taken.origin or checkpoints_in(parts.checkpoints.folder):
        tell_start("loading the checkpoint")
    resumed = parts.resume()
    parts.taken.record(parts.store.tokenizer(), base)
    resumed.notes.extend(bring_history(parts.folder, parts.checkpoints.nodes, resumed.step))
    saved = str(resumed.path) if resumed.path else None
    if parts.taken.leads:
        forget_beats(parts.folder)
    with StateRecord(
        parts.folder,
        step=resumed.step,
        steps=job.train.steps,
        saved=saved,
        active=parts.taken.leads,
        ranks=parts.world_size,
        machine=describe_machine(torch.get_num_threads()),
    ) as state:
        summary = _train(parts, resumed, state, leave)
        parts.close()
    return summary


def trainer_of(parts: Parts, reporter: Reporter, **more: Any) -> Trainer:
    """The loop over a run's parts; `more` as in `Trainer`."""
    return Trainer(
        parts.job,
        engine=parts.engine,
        tables=parts.tables,
        train_loader=parts.train_loader,
        held_out=parts.held_out,
        checkpoints=parts.checkpoints,
        reporter=reporter,
        **more,
    )


def _train(
    parts: Parts, resumed: Resumed, state: StateRecord, leave: Callable[[BaseException], None]
) -> Summary | None:
    """All steps of a run that was resumed, and what comes after them."""
    job, start = parts.job, resumed.step
    watch = _watch(parts, state, leave)
    with Reporter(job, parts.folder, start=start, active=parts.rank == 0, state=state) as reporter:
        told = notes(job, parts.train_loader, parts.held_out, parts.world_size)
        for note in (*resumed.notes, *told):
            reporter.message(note)
        trainer = trainer_of(parts, reporter, profiler=_profiler(parts), watch=watch, resumed=resumed)
        if start == job.train.steps:
            reporter.message(f"{parts.folder} already has all {start} steps: nothing left to train")
        else:
            tell_start(f"training steps {start + 1} to {job.train.steps}")
        found = trainer.fit()
    watch.close()
    samples = continued_prompts(parts)
    if parts.rank != 0:
        return None
    summary = summarise(
        parts, found, samples, trainer.rows_moved, tokens=trainer.tokens, start=start, look_ahead=state.look_ahead
    )
    summary.save(parts.folder)
    return summary


def _profiler(parts: Parts) -> StepProfiler:
    config = parts.job.train.profile
    group = host_group(parts.job.launch.timeout_s) if config else None
    return StepProfiler(config, parts.folder, parts.engine.device, group)


def _watch(parts: Parts, state: StateRecord, leave: Callable[[BaseException], None]) -> RunWatch:
    """What records how the run ends, where the loop cannot: at a second signal, or when a rank hangs."""

    def leave_at_once(told: str, code: int) -> None:
        state.end("interrupted", told)
        if parts.rank == 0:
            os.write(2, f"{told}\n".encode())  # not print: another thread may be within it
        os._exit(code)

    def leave_hung(error: BaseException) -> None:
        state.end("failed", str(error))
        leave(error)

    return RunWatch(
        parts.folder,
        parts.rank,
        parts.checkpoints.nodes.beside(parts.rank),
        hang_s=parts.job.train.hang_s,
        signals=StopSignals(parts.job.checkpoint.grace_s, leave_at_once),
        leave=leave_hung,
        memory=partial(memory_use, parts.engine.device),
        store=job_store() if parts.checkpoints.nodes.several else None,
    )
