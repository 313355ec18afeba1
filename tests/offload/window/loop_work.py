"""What the training thread itself does for the tables between two steps: `python -m tests.offload.window.loop_work`.

The job's own text and plans, at full size, with the window's decisions on a thread as on a GPU. Copies of records are
left out, and what a GPU would compute (rows read, summed, updated) is not counted: the rest is the loop's, in processor
time of its thread. After each step the thread counts in Python while the window's thread is at work: what it then loses
is the interpreter's lock (and the machine's other load).
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import click
import torch

import offload.transfers.zero_copy
from kernels import compiled_loops
from offload import opening
from offload.rows.updater import RowUpdater
from offload.step import RankShard, Step
from offload.tables import EngramTables
from offload.window.store import WindowStore
from tests.offload.window.bus_bytes import CONFIG, open_job
from train.config.file import load
from train.config.job import JobConfig

PHASES = {"begin": (EngramTables, "begin"), "apply": (Step, "apply")}
PARTS = {"acquire": (WindowStore, "hold"), "finish": (EngramTables, "_finish")}
"""Of the phases, in this order."""
COMPUTED = ((RowUpdater, "read"), (RowUpdater, "update_at"), (RankShard, "rows_of"), (Step, "reduce"))
COPIED = ("fetch_records", "draw_records", "write_records")


class LoopWork:
    """Seconds of one step, by the name of what they were spent on: those of the loop's thread, of the window's
    (`window`), and those that a busy loop on the loop's thread lost meanwhile (`lost`)."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._computed = 0.0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Counts within, in the tables that are opened within."""
        with ExitStack() as stack:

            def put(owner: Any, name: str, value: Any) -> None:
                stack.enter_context(mock.patch.object(owner, name, value))

            put(opening, "_DECIDING_BESIDE", ("cpu",))
            for name in COPIED:
                put(offload.transfers.zero_copy, name, lambda *_, **__: None)
            for owner, name in COMPUTED:
                put(owner, name, self._computing(getattr(owner, name)))
            for name, (owner, method) in (PHASES | PARTS).items():
                put(owner, method, self._timed(name, getattr(owner, method)))
            put(WindowStore, "_ask", self._asking(WindowStore._ask))
            yield

    def lose(self, tables: EngramTables) -> None:
        """Counts in Python until the window's thread has nothing to do."""
        asked = tables._shard.store._asked  # type: ignore[attr-defined]
        wall, mine = time.perf_counter(), time.thread_time()
        while asked and not asked[-1].done():
            sum(range(1000))
        self.seconds["lost"] += (time.perf_counter() - wall) - (time.thread_time() - mine)

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started, computed = time.thread_time(), self._computed
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] += time.thread_time() - started - (self._computed - computed)

        return timed

    def _computing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def computing(*args: Any, **kwargs: Any) -> Any:
            started, before = time.thread_time(), self._computed
            try:
                return function(*args, **kwargs)
            finally:
                self._computed = before + time.thread_time() - started

        return computing

    def _asking(self, ask: Callable[..., Any]) -> Callable[..., Any]:
        def asking(store: WindowStore, decide: Callable[..., None], *args: Any) -> Any:
            def decided() -> None:
                started = time.thread_time()
                decide(*args)
                self.seconds["window"] += time.thread_time() - started

            return ask(store, decided)

        return asking


def work_of_steps(job: JobConfig, steps: int, warmup: int) -> list[Counter[str]]:
    """What each step took after the first `warmup`; their plans are never late, and their rows are there."""
    found, work = [], LoopWork()
    with work.watching():
        engine = job.offload.model_copy(update={"engine": "zero_copy"})
        tables = open_job(job.model_copy(update={"offload": engine}), warmup + steps)
        try:
            for step in range(warmup + steps):
                for ahead in range(step, min(step + job.offload.depth + 2, warmup + steps)):
                    tables._planner.request(ahead)
                    tables._planner.plan(ahead)
                work.seconds = Counter()
                begun = tables.begin(step)
                rows = len(begun._slots_O)
                begun.reduce()
                begun.apply(lr=1.0)
                work.lose(tables)
                found.append(work.seconds + Counter(rows=rows))
        finally:
            tables.close()
    return found[warmup:]


def told(found: list[Counter[str]]) -> str:
    """Medians, in ms, with the 10th to 90th percentile."""

    def spread(of: Callable[[Counter[str]], float]) -> str:
        taken = sorted(1e3 * of(step) for step in found)
        low, high = (taken[round(part * (len(taken) - 1))] for part in (0.1, 0.9))
        return f"{statistics.median(taken):.2f} ({low:.2f} to {high:.2f})"

    def own(step: Counter[str]) -> float:
        return sum(step[name] for name in PHASES)

    lines = [f"of a step of {statistics.median(step['rows'] for step in found):,.0f} rows, ms of processor time:"]
    lines.append(f"  the loop's thread: {spread(own)}")
    for name in (*PHASES, *PARTS):
        lines.append(f"    {name}: {spread(lambda step, name=name: step[name])}")
    lines.append(f"  the window's thread: {spread(lambda step: step['window'])}")
    lines.append(f"  meanwhile lost by a busy loop on the loop's thread: {spread(lambda step: step['lost'])}")
    return "\n".join(lines)


@click.command()
@click.argument("config", default=str(CONFIG))
@click.option("--steps", default=20, show_default=True, help="That count.")
@click.option("--warmup", default=15, show_default=True, help="Steps before them, in which the window fills.")
@click.option("--without-numba", is_flag=True, help="As where Numba is missing.")
def main(config: str, steps: int, warmup: int, without_numba: bool) -> None:
    """Measures the loop's own work for the tables of CONFIG."""
    torch.set_num_threads(1)
    available = compiled_loops.available() and not without_numba
    with mock.patch.object(compiled_loops, "available", return_value=available):
        found = work_of_steps(load(config, [], JobConfig), steps, warmup)
    click.echo(f"{Path(config).stem}, {'with' if available else 'without'} Numba: {told(found)}")


if __name__ == "__main__":
    main()
