"""The jobs of `test_hazards.py`, in all their variants, run once for all tests: on one, two, three and four ranks."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from offload.config import OffloadConfig
from tests.distributed import run_ranks
from tests.offload.delays import LONGEST_S
from tests.offload.hazard_job import SEQUENCES, Addresses, Case, Job, Outcome, Tokens, run_case, run_cases_by_size

RANKS = 4
LENGTH = 3
ROOM = 18
LATE_S = 0.02
"""The longest pause of a write-back in the windows that a job is made for: longer than a step lasts."""
EVERY = frozenset(range(100))
NOTHING: Tokens = ((),) * SEQUENCES

Runs = dict[int, dict[str, list[list[Outcome]]]]
"""By number of ranks, then by job: for each of its variants, what every rank saw."""


def tokens_of(ids: Iterable[int]) -> Tokens:
    """A step that uses these token ids, again and again until its sequences are full."""
    endless = itertools.cycle(ids)
    return tuple(tuple(itertools.islice(endless, LENGTH)) for _ in range(SEQUENCES))


def periodic(depth: int, steps: int = 14) -> tuple[Tokens, ...]:
    """Token 0 at every step, tokens 1 to 3 every d, d + 1 and d + 2 steps, and others that push them out."""
    periods = {0: 1, 1: max(1, depth), 2: depth + 1, 3: depth + 2}
    others = [[10 + (6 * step + n) % 80 for n in range(6)] for step in range(steps)]
    return tuple(
        tokens_of([token for token, period in periods.items() if step % period == 0] + others[step])
        for step in range(steps)
    )


def drawn(seed: int, steps: int, low: int = 0, high: int = 97, width: int = 97) -> tuple[Tokens, ...]:
    """Random tokens out of a narrow range that moves: rows come back after one, a few, or many steps."""
    generator = torch.Generator().manual_seed(seed)

    def step() -> Tokens:
        start = int(torch.randint(low, max(low, high - width) + 1, (), generator=generator))
        ids = torch.randint(start, min(start + width, high), (SEQUENCES, LENGTH), generator=generator)
        return tuple(map(tuple, ids.tolist()))

    return tuple(step() for _ in range(steps))


def returning(cycles: int = 6) -> tuple[Tokens, ...]:
    """Six new tokens, four new ones, and at once those that had to leave for them from a window of ROOM tokens.

    Without look-ahead, these are then on their way to host memory, and free slots are there to fetch them into.
    """
    held: list[int] = []
    fresh, steps = itertools.count(), []
    for _ in range(cycles):
        for count in (6, 4):
            new = list(itertools.islice(fresh, count))
            held = held[max(0, len(held) + count - ROOM) :] + new
            # After each step, room is made for another one like it.
            excess = max(0, len(held) + count - ROOM)
            leaving, held = held[:excess], held[excess:]
            steps.append(new)
        held += leaving
        steps.append(leaving or new)
    return tuple(map(tokens_of, steps))


JOBS = {
    "periodic": Job(periodic(2)),
    "churn": Job(drawn(1, 14, width=12)),
    "alternating": Job((tokens_of(range(12)), tokens_of(range(30, 42))) * 6),
    "returning": Job(returning(), addresses=Addresses((400, 1)), windows=((0, ROOM - 6),)),
    "one row": Job((tokens_of([7]), tokens_of([7, 8]), *drawn(2, 2), tokens_of([7])) * 2, exact=True),
    "quadratic": Job(drawn(3, 6, width=12), micro_batches=3),
    "one micro-batch": Job(drawn(4, 6, width=30), exact=True),
    "micro-batches": Job(drawn(4, 6, width=30), exact=True, micro_batches=3),
    "skips": Job(
        drawn(5, 12, width=12), skipped=frozenset({0, 3, 4, 9}), abandoned=frozenset({2, 4, 10}), evaluated=EVERY
    ),
    "saves": Job(drawn(6, 9, width=14), exact=True, saved=EVERY, skipped=frozenset({4})),
    "nothing": Job(
        (NOTHING, tokens_of([0]), NOTHING, NOTHING, tokens_of([0, 1]), tokens_of([1])),
        addresses=Addresses((2, 1)),
        evaluated=EVERY,
    ),
    "skewed": Job(drawn(7, 8, high=20, width=9) + drawn(8, 3)),
}
THOROUGH = {
    1: {"periodic": 6, "churn": 6, "alternating": 6, "skips": 6, "skewed": 6},
    2: {"periodic": 6, "churn": 6, "skips": 3, "skewed": 3},
    4: {"churn": 6, "skewed": 3},
}
"""How many variants run, by number of ranks, of jobs whose hazards lie in the timing; two of all others."""
CHEAP = {
    1: dict.fromkeys(THOROUGH[1], 4),
    2: {"periodic": 3, "churn": 3} | dict.fromkeys(("one row", "quadratic", "one micro-batch", "micro-batches"), 0),
    4: dict.fromkeys(("periodic", "churn", "alternating", "returning", "skips"), 0),
}
"""The same in the suite that takes minutes: hazards of timing on two ranks, of the order of sums on four."""

BROKEN_BETWEEN_RANKS = ("summed_in_order_of_arrival", "last_rank_wins")
"""Rules of `broken_rules.py` that bind several ranks: "quadratic" runs once with each of them broken."""


def variants(job: Job, world_size: int, base: OffloadConfig | None = None) -> list[Case]:
    """A job on the device alone, in windows as small as can be, and in larger ones."""
    tiny = max(1, job.most_rows(world_size))
    windows = [(depth, tiny + spare) for depth, spare in job.windows]
    windows += [(2, tiny), (4, tiny + 2), (0, tiny), (0, 2 * tiny), (1, 1000)]
    changes: list[dict] = [{"mode": "resident"}]
    changes += [{"depth": depth, "window_rows": rows} for depth, rows in windows]
    configs = [(base or OffloadConfig()).model_copy(update=change) for change in changes]
    late = range(1, len(job.windows) + 1)
    return [
        Case(job, config, seed, longest_write_back_s=LATE_S if seed in late else LONGEST_S)
        for seed, config in enumerate(configs)
    ]


def reload_cases(saved: Outcome, world_size: int) -> list[Case]:
    """On to the end from what one rank saved: from every image on one rank, in turns on several."""
    images = saved.images if world_size == 1 else saved.images[world_size - 2 :: 3]
    config = OffloadConfig(depth=2, window_rows=JOBS["saves"].most_rows(1))
    return [Case(JOBS["saves"], config, image.done, image) for image in images]


def run_everything(counts: dict[int, dict[str, int]]) -> Runs:
    """Starts four ranks once; smaller jobs run on the first of them, several at once where there are ranks for it.

    `counts` is `THOROUGH` or `CHEAP`.
    """
    saved = run_case(variants(JOBS["saves"], 1)[0])
    cases = {size: _cases(size, saved, counts.get(size, {})) for size in range(1, RANKS + 1)}
    flat = {size: [case for of_job in jobs.values() for case in of_job] for size, jobs in cases.items()}
    by_rank = run_ranks(run_cases_by_size, RANKS, flat)
    runs: Runs = {}
    for size, jobs in cases.items():
        by_case = iter(range(len(flat[size])))
        runs[size] = {name: [_of_case(by_rank, size, next(by_case)) for _ in part] for name, part in jobs.items()}
    return runs


def _cases(size: int, saved: Outcome, counts: dict[str, int]) -> dict[str, list[Case]]:
    jobs = {"saves": JOBS["saves"]} if size == 3 else JOBS
    cases = {name: variants(job, size)[: counts.get(name, 2)] for name, job in jobs.items()}
    if size == RANKS:
        cases |= {rule: [replace(cases["quadratic"][1], broken=rule)] for rule in BROKEN_BETWEEN_RANKS}
    return cases | {"reloads": reload_cases(saved, size)}


def _of_case(by_rank: Sequence[dict[tuple[int, int], Outcome]], size: int, number: int) -> list[Outcome]:
    return [outcomes[size, number] for outcomes in by_rank if (size, number) in outcomes]
