"""Verify mode finds what is wrong in the step in which it goes wrong, and names it (hazard 16)."""

import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from kernels.gather.values import RowValues
from offload import step as step_module
from offload.config import OffloadConfig, RowDtype
from offload.plan import exchange
from offload.plan.sharding import Sharding
from offload.rows.records import RecordLayout, RowInit
from offload.verify.shadow import Shadow, VerifyError
from offload.verify.verifier import Verifier
from tests.command_line import TIMEOUT_S, losses, table_rows, train, write_job
from tests.distributed import run_ranks
from tests.offload import breakages
from tests.offload.breakages import Breakage
from tests.offload.hazard_job import Case, Job, look_up, open_tables, train_step
from tests.offload.hazard_runs import drawn
from tests.warm_command import started_warm

JOB = Job(drawn(21, 12, width=10), skipped=frozenset({3}), micro_batches=2)
AT = 6
ROW = r"row \d+ \(owner rank \d\)"
VALUES = r"is -?\d[-\d.e]* and must be -?\d[-\d.e]*"
WEIGHT = rf"{ROW}: weight \d {VALUES}"
VERSION = rf"{ROW}: version is \d+ and must be \d+"

FOUND: dict[Breakage, str] = {
    breakages.flipped_slot: rf"step {AT + 1}, as fetched for the step: {WEIGHT}",
    breakages.flipped_host: rf"step {AT + 1}, (as fetched for|read again after) the step: {WEIGHT}",
    breakages.aged_host: rf"step {AT + 1}, (as fetched for|read again after) the step: {VERSION}",
    breakages.written_elsewhere: rf"step {AT}, in host memory, as saved: {ROW}: version is \d+ and must be 0",
    breakages.lost_write_back: rf"step \d+, (as fetched for|read again after) the step: {VERSION}",
    breakages.forgotten_dirt: rf"step \d+, (as fetched for|in the window after|read again after) the step: {VERSION}",
    breakages.other_values: rf"step {AT + 1}, as rank \d received it: {ROW}: column 0 {VALUES}",
    breakages.other_gradients: rf"step {AT + 1}, its gradient: {ROW}: column 0 {VALUES}",
    breakages.updated_twice: rf"step {AT + 1}, after its update: {VERSION}",
    breakages.not_caught_up: rf"step {AT + 1}, brought up to date: {ROW}: (weight|state) \d {VALUES}",
}
PLANS: dict[Breakage, str] = {
    breakages.other_rows: rf"step {AT + 1}: the plan of rank 0 looks up other rows than its token ids do: "
    r"row \d+ instead of \d+",
    breakages.other_order: rf"step {AT + 1}: the plan of rank 0 sums in another order",
    breakages.other_owned: rf"step {AT + 1}: rank 0 plans to send rank 0 other rows of module 0 than it asks for: "
    r"row \d+ instead of \d+",
}


def break_job(breakage: Breakage, world_size: int = 1) -> None:
    """Trains a job that is broken, on every rank, from step AT on."""
    config = OffloadConfig(depth=2, window_rows=JOB.most_rows(world_size) // 2 * 3, verify=True)
    tables = open_tables(Case(JOB, config))
    try:
        for step in range(AT):
            train_step(tables, JOB, step)
            look_up(tables, JOB, step)
        with breakage(tables, AT):
            for step in range(AT, len(JOB.steps)):
                train_step(tables, JOB, step)
    finally:
        tables.close()


@pytest.mark.parametrize("breakage", FOUND | PLANS, ids=lambda breakage: breakage.__name__)
def test_the_first_difference_stops_the_step_and_names_row_owner_and_values(breakage: Breakage) -> None:
    with pytest.raises(VerifyError, match=rf"^offload\.verify: {(FOUND | PLANS)[breakage]}$"):
        break_job(breakage)


@pytest.mark.parametrize(
    ("dtypes", "names"),
    [
        (("fp32", "fp32"), {0: "weight 0", 5: "state 0", 14: "state 9", 15: "version"}),
        (("bf16", "fp32"), {0: "word 0 of the bf16 weights", 3: "state 0", 13: "version"}),
        (("fp32", "bf16"), {4: "weight 4", 5: "word 0 of the bf16 state", 10: "version"}),
        (("bf16", "bf16"), {2: "word 2 of the bf16 weights", 7: "word 4 of the bf16 state", 8: "version"}),
    ],
)
def test_a_difference_names_the_part_of_the_record(dtypes: tuple[RowDtype, RowDtype], names: dict[int, str]) -> None:
    layout = RecordLayout(5, 10, *dtypes)
    unpacked = {0: "weight 0", 4: "weight 4", 5: "state 0", 14: "state 9", 15: "version"}
    shadow, row = Shadow(layout, RowInit(0, 0.02), Sharding((4,), 1), 0), torch.tensor([3])
    for words, named in ((layout.words, names), (layout.unpacked.words, unpacked)):
        for word, name in named.items():
            found = torch.zeros(1, words)
            found[0, word] = 1.0
            with pytest.raises(VerifyError, match=rf"here: row 3 \(owner rank 0\): {name} is"):
                shadow.require(row, found, torch.zeros(1, words), "here")


@contextmanager
def differences_recorded() -> Iterator[list[str]]:
    """Takes note of differences and goes on: a rank that stopped would leave the others waiting for it."""
    messages: list[str] = []

    def going_on(compare: Callable[..., None]) -> Callable[..., None]:
        def wrapped(*args: Any) -> None:
            try:
                compare(*args)
            except VerifyError as error:
                messages.append(str(error))

        return wrapped

    with (
        mock.patch.object(Shadow, "require", going_on(Shadow.require)),
        mock.patch.object(Verifier, "_require_equal", going_on(Verifier._require_equal)),
    ):
        yield messages


def first_differences(names: Sequence[str], world_size: int) -> list[str]:
    """The first difference that this rank finds in each of these broken jobs, "" for none."""
    found = []
    for name in names:
        with differences_recorded() as messages:
            break_job(getattr(breakages, name), world_size)
        found.append(messages[0] if messages else "")
    return found


BETWEEN_RANKS = [
    breakages.flipped_slot,
    breakages.lost_write_back,
    breakages.other_values,
    breakages.other_gradients,
    breakages.updated_twice,
]


@pytest.mark.parametrize("broken", [BETWEEN_RANKS, pytest.param([*FOUND], marks=pytest.mark.long)], ids=["few", "all"])
def test_each_rank_of_two_finds_what_is_wrong_with_its_own_rows(broken: list[Breakage]) -> None:
    by_rank = run_ranks(first_differences, 2, [breakage.__name__ for breakage in broken], 2)
    for breakage, *messages in zip(broken, *by_rank, strict=True):
        for rank, message in enumerate(messages):
            assert re.fullmatch(rf"offload\.verify: {FOUND[breakage]}", message), (breakage.__name__, rank, message)
            assert f"(owner rank {rank})" in message


def break_the_last_rank() -> None:
    """From the third step on, all that it receives is changed."""
    calls = itertools.count(1)

    def exchange_values(*args: Any, **keywords: Any) -> Any:
        last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
        values = exchange.exchange_values(*args, **keywords).tensor()
        return RowValues(values + (last and next(calls) > 4))

    step_module.exchange_values = exchange_values


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.long), 2])
def test_a_run_ends_with_one_line_when_one_rank_finds_a_difference(ranks: int, corpus: Path, tmp_path: Path) -> None:
    """The other ranks, in the middle of their exchanges, are ended: nothing hangs."""
    job = write_job(tmp_path, corpus)
    command = ["train", str(job), "offload.verify=true", "eval.every=5", "--nproc", str(ranks)]
    environment = {"OMP_NUM_THREADS": "1"}
    with started_warm(command, cwd=None, environment=environment, prepare=break_the_last_rank) as started:
        result = started.result(TIMEOUT_S)
    assert result.returncode == 1, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert re.fullmatch(
        rf"Error: rank \d: offload\.verify: step 3, as rank {ranks - 1} received it: {ROW}: column 0 {VALUES}", line
    )
    assert "Traceback" not in result.stderr + result.stdout


def test_verify_mode_changes_nothing_and_is_off_by_default(corpus: Path, tmp_path: Path) -> None:
    assert not OffloadConfig().verify
    job = write_job(tmp_path, corpus)
    outcomes = []
    for verify in ("false", "true"):
        train(job, f"run.name=verify-{verify}", f"offload.verify={verify}", "--nproc", "2")
        run = tmp_path / "runs" / f"verify-{verify}"
        outcomes.append((losses(run), table_rows(run)))
    assert outcomes[0] == outcomes[1]
