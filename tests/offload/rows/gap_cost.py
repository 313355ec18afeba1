"""What rows that missed steps cost a step, long into a run: `python -m tests.offload.rows.gap_cost`.

Each step draws ids anew from the same Zipf distribution, so how many steps a row missed has a known distribution at any
step of a run: it is drawn, row by row, for one step each of a few lengths of run, and the compiled pass reads exactly
those rows on one core.
"""

import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offload.config import TableOptimizerConfig
from offload.rows.records import RecordLayout
from offload.rows.updater import RowUpdater

ROWS, LOOKUPS, SKEW, DIM = 4_000_000, 262_144, 1.2, 80
STEPS = (1_000, 10_000, 100_000)
ROUNDS = 7
REST = 300  # missed steps that are counted at most, about where weights come to rest


def gaps_at(step: int, random: np.random.Generator) -> NDArray[np.int64]:
    """Of each row that a step reads: how many steps it missed; -1 if it was never updated."""
    chance = np.arange(1, ROWS + 1) ** -SKEW
    chance = -np.expm1(LOOKUPS * np.log1p(-chance / chance.sum()))  # to be read by a step
    chance = chance[random.random(ROWS) < chance]
    gaps = random.geometric(chance) - 1
    return np.where(gaps < step - 1, gaps, -1)


def records_of(layout: RecordLayout, versions_U: Tensor) -> Tensor:
    """Rows as they are after a first gradient."""
    generator = torch.Generator().manual_seed(0)
    weights_UD, gradients_UD = (torch.randn(len(versions_U), DIM, generator=generator) for _ in range(2))
    records_UX = torch.zeros(len(versions_U), layout.words)
    layout.weights(records_UX).copy_(0.02 * weights_UD)
    layout.state(records_UX).copy_(torch.cat([1e-5 * gradients_UD, (1e-4 * gradients_UD) ** 2 * 0.05], dim=1))
    layout.state(records_UX)[versions_U == 0] = 0.0
    layout.version(records_UX).copy_(versions_U)
    return records_UX


def reads(step: int, gaps_U: NDArray[np.int64]) -> Iterator[tuple[str, Callable[[], object]]]:
    """The read of these rows at a step, by `untouched_rows`."""
    slots_U = torch.randperm(len(gaps_U), generator=torch.Generator().manual_seed(1))
    versions_U = torch.from_numpy(np.where(gaps_U < 0, 0, step - 1 - gaps_U))
    for untouched in ("exact", "closed", "lazy"):
        config = TableOptimizerConfig.model_validate({"untouched_rows": untouched})
        layout = RecordLayout.of(DIM, config)
        updater, records_UX = RowUpdater(config, layout), records_of(layout, versions_U)
        updater.load_state(updater.state() | {"learning_rates": [5e-3] * (step - 1)})
        updater.read(records_UX, slots_U)
        yield untouched, lambda updater=updater, records=records_UX: updater.read(records, slots_U)  # type: ignore[misc]


def main() -> None:
    """Prints a line for each length of run."""
    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    for step in STEPS:
        gaps_U = gaps_at(step, random)
        missed = gaps_U.clip(0)
        print(f"step {step:,}: {len(gaps_U):,} rows, {(gaps_U > 0).sum():,} missed {missed.sum():,} steps,", end=" ")
        print(f"{missed.clip(max=REST).sum():,} of them among the first {REST} of their gap", flush=True)
        times: dict[str, list[float]] = {}
        each = list(reads(step, gaps_U))
        for _ in range(ROUNDS):
            for untouched, read in each:
                started = time.process_time()
                read()
                times.setdefault(untouched, []).append(1e3 * (time.process_time() - started))
        for untouched, took in times.items():
            print(f"  {untouched}: {statistics.median(took):.1f} ms ({min(took):.1f} to {max(took):.1f})", flush=True)


if __name__ == "__main__":
    main()
