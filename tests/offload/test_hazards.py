"""The hazards of a table that is fetched ahead and written back behind, each by its number (docs/hazards.md).

Everything that runs beside the training loop is delayed at random, and every copy is torn in two. What runs on a
number of ranks is in `hazard_runs.py`; that a broken rule would be noticed, in `test_broken_rules.py`.
"""

from collections.abc import Iterable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.gather import gather
from kernels.records.row_init import initial_rows
from offload.config import OffloadConfig, TableOptimizerConfig
from offload.plan.plan import Tokens
from offload.rows.records import RowInit
from offload.tables import EngramTables
from tests.offload.delays import Seen
from tests.offload.hazard_job import (
    DIM,
    SEED,
    Addresses,
    Case,
    Image,
    Job,
    Outcome,
    merged,
    open_tables,
    run_case,
    train_step,
    use_rows,
)
from tests.offload.hazard_reference import reference_rows
from tests.offload.hazard_runs import (
    BROKEN_BETWEEN_RANKS,
    JOBS,
    NOTHING,
    Runs,
    drawn,
    periodic,
    reload_cases,
    tokens_of,
    variants,
)

EXACT_ADAM = TableOptimizerConfig()
ROWS = {
    "adam-exact": OffloadConfig(),
    "adam-lazy": OffloadConfig(optimizer=TableOptimizerConfig(untouched_rows="lazy")),
    "adagrad": OffloadConfig(optimizer=TableOptimizerConfig(type="rowwise_adagrad")),
    "rmsprop": OffloadConfig(optimizer=TableOptimizerConfig(type="rowwise_rmsprop")),
    "adam-bf16": OffloadConfig(row_dtype="bf16", exchange_dtype="bf16"),
    "adam-bf16-state": OffloadConfig(optimizer=TableOptimizerConfig(state_dtype="bf16")),
    "adam-bf16-all": OffloadConfig(row_dtype="bf16", optimizer=TableOptimizerConfig(state_dtype="bf16")),
}
DEPTHS = (0, 1, 2, 4)


def rows_of(ranks: Sequence[Outcome]) -> dict[int, bytes]:
    return merged([outcome.rows for outcome in ranks])


def seen_by(variants_: Iterable[Sequence[Outcome]]) -> Seen:
    return sum((outcome.seen for ranks in variants_ for outcome in ranks), start=Seen())


def require_same_bits(runs: Runs, job: str, world_size: int) -> None:
    resident, *windows = runs[world_size][job]
    for number, ranks in enumerate(windows):
        for rank, (found, expected) in enumerate(zip(ranks, resident, strict=True)):
            place = f"variant {number + 1} on rank {rank} of {world_size}"
            assert found.bits == expected.bits, f"{place} differs from the resident shard"
            assert found.leaks == {}, place


on_ranks = pytest.mark.parametrize("world_size", [1, 2, 4])
on_up_to_two_ranks = pytest.mark.parametrize("world_size", [1, 2, pytest.param(4, marks=pytest.mark.long)])
on_one_and_four_ranks = pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.long), 4])


@pytest.mark.parametrize("depth", DEPTHS)
def test_1_no_row_is_read_before_its_last_update_landed_at_any_period(depth: int) -> None:
    """Read after write: a row used every d, d + 1, d + 2 steps has the bits of a table that never moves."""
    job = Job(periodic(depth))
    expected = reference_rows(job, EXACT_ADAM, 1)
    for window in (job.most_rows(1), job.most_rows(1) + 3, 1000):
        outcome = run_case(Case(job, OffloadConfig(depth=depth, window_rows=window), seed=window))
        assert outcome.rows == expected
        assert window == 1000 or outcome.seen.reused > 0


@on_up_to_two_ranks
def test_1_at_all_depths_on_several_ranks(runs: Runs, world_size: int) -> None:
    require_same_bits(runs, "periodic", world_size)


@on_up_to_two_ranks
def test_2_rows_evicted_fetched_again_and_resurrected_keep_their_bits(runs: Runs, world_size: int) -> None:
    """Evict, refetch, resurrect: windows that hold one step, write-backs that land late."""
    require_same_bits(runs, "churn", world_size)
    require_same_bits(runs, "alternating", world_size)
    require_same_bits(runs, "returning", world_size)
    seen = seen_by(runs[world_size]["returning"])
    assert seen.resurrected > 0, "no row was resurrected: the test would prove nothing"
    assert seen.waited > 0, "no update had to wait for a copy: the test would prove nothing"


@on_up_to_two_ranks
def test_3_a_slot_is_not_reused_while_it_is_read(runs: Runs, world_size: int) -> None:
    """Write after read: slots go to other rows while late write-backs read them."""
    seen = seen_by(runs[world_size]["churn"])
    assert seen.reused > 50, "hardly a slot was reused: the test would prove nothing"
    assert seen.full > 0, "no step ever found the window full: the test would prove nothing"
    require_same_bits(runs, "churn", world_size)


@pytest.mark.parametrize(
    ("name", "few"),
    [("adam-exact", False)]
    + [(name, True) for name in ROWS if name != "adam-exact"]
    + [pytest.param(name, False, marks=pytest.mark.long) for name in ROWS if name != "adam-exact"],
)
def test_4_torn_and_delayed_copies_leave_every_version_right(name: str, few: bool) -> None:
    """Write after write, torn rows: verify mode compares each record's version and values, in both places."""
    job = Job(drawn(11, 16, width=10), skipped=frozenset({3, 4}))
    cases = variants(job, 1, ROWS[name])[: 3 if few else None]
    resident, *windows = (run_case(case) for case in cases)
    for case in cases[1 : 2 if few else 4]:
        windows.append(run_case(Case(job, case.config.model_copy(update={"verify": True}), case.seed + 50)))
    assert all(outcome.bits == resident.bits for outcome in windows)


@on_one_and_four_ranks
def test_5_a_row_that_all_ranks_use_is_updated_once_with_all_their_gradients(runs: Runs, world_size: int) -> None:
    """Lost or double update: with sums that no order changes, any number of ranks gives the bits of one."""
    require_same_bits(runs, "one row", world_size)
    for ranks in runs[world_size]["one row"]:
        assert rows_of(ranks) == rows_of(runs[1]["one row"][0])


@on_one_and_four_ranks
def test_6_sums_are_taken_in_lookup_order_then_by_micro_batch_then_by_rank(runs: Runs, world_size: int) -> None:
    """Summation order: the bits of a plain loop that emulates the ranks."""
    require_same_bits(runs, "quadratic", world_size)
    expected = reference_rows(JOBS["quadratic"], EXACT_ADAM, world_size)
    assert rows_of(runs[world_size]["quadratic"][0]) == expected
    assert rows_of(runs[world_size]["quadratic"][1]) == expected


# With two ranks the order of arrival changes nothing: a + b is b + a.
@pytest.mark.parametrize("rule", BROKEN_BETWEEN_RANKS)
def test_6_a_broken_rule_between_ranks_is_noticed(runs: Runs, rule: str) -> None:
    (ranks,) = runs[4][rule]
    assert rows_of(ranks) != reference_rows(JOBS["quadratic"], EXACT_ADAM, 4)


@on_one_and_four_ranks
def test_7_micro_batches_add_up_to_the_whole_batch(runs: Runs, world_size: int) -> None:
    """Gradient accumulation: with sums that no order changes, three micro-batches give the bits of one."""
    require_same_bits(runs, "micro-batches", world_size)
    for parts, whole in zip(*(runs[world_size][name] for name in ("micro-batches", "one micro-batch")), strict=True):
        assert rows_of(parts) == rows_of(whole) == rows_of(runs[1]["one micro-batch"][0])


@on_up_to_two_ranks
def test_8_skipped_and_abandoned_steps_and_evaluations_leave_no_trace(runs: Runs, world_size: int) -> None:
    """Skips, evaluation between steps, forward without backward: no row, counter or queue knows of them."""
    require_same_bits(runs, "skips", world_size)
    skips = JOBS["skips"]
    assert rows_of(runs[world_size]["skips"][-1]) == reference_rows(skips, EXACT_ADAM, world_size)


def test_8_a_step_whose_loss_was_never_computed_backward_gives_zeros() -> None:
    """A forward without backward that is applied all the same: Adam's moments decay, nothing else happens."""
    job = Job(periodic(1, steps=2), exact=True)
    tables = open_tables(Case(job, OffloadConfig()))
    try:
        train_step(tables, job, 0)
        step, _ = use_rows(tables, job, 1)
        assert float(step.reduce()) == 0
        step.apply(lr=0.1)
        assert {row for ids, _ in tables.updated_rows() for row in ids.tolist()}
    finally:
        tables.close()


def test_8_no_counter_grows_with_the_number_of_steps() -> None:
    """A window in which nothing is ever evicted must not remember every step."""
    job = Job(drawn(12, 4, width=9) * 30)
    assert run_case(Case(job, OffloadConfig(depth=2, window_rows=1000))).leaks == {}


def test_9_a_step_hands_out_the_batches_that_its_rows_were_planned_for() -> None:
    """A loader that gives other tokens whenever it is asked: plan and step cannot disagree, for it is asked once."""
    job = Job(drawn(9, 3))
    asked: list[int] = []

    def batches(number: int) -> list[Tokens]:
        asked.append(number)
        return job.batches(len(asked), 0, 1)

    tables = EngramTables(
        OffloadConfig(), job.addresses, dim=DIM, init=RowInit(SEED, 0.02), batches=batches, num_steps=3
    )
    try:
        for number in range(3):
            step = tables.begin(number)
            for place, batch in enumerate(step.batches):
                for module, (leaf, index) in enumerate(step.rows.of(place)):
                    ids = job.addresses.rows(module, batch.tokens_BT).flatten()
                    expected = initial_rows(ids + module * job.addresses.sizes[0], DIM, seed=SEED, std=0.02)
                    assert torch.equal(gather(leaf.detach(), index), expected)
            step.skip()
        assert sorted(asked) == [0, 1, 2]
    finally:
        tables.close()


@pytest.mark.parametrize("wrong", [0, 2])
def test_9_a_repeated_or_dropped_step_is_refused(wrong: int) -> None:
    """A step trained twice or left out: refused before anything happened."""
    job = Job(drawn(10, 4))
    tables = open_tables(Case(job, OffloadConfig()))
    try:
        train_step(tables, job, 0)
        with pytest.raises(RuntimeError, match=f"step {wrong} does not follow step 0"):
            use_rows(tables, job, wrong)
    finally:
        tables.close()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_10_every_step_saved_under_load_is_the_same_on_any_number_of_ranks(runs: Runs, world_size: int) -> None:
    """Checkpoint in flight: fetches and write-backs are under way at every save."""
    (alone,) = runs[1]["saves"][0]
    for ranks in runs[world_size]["saves"]:
        for number, image in enumerate(alone.images):
            assert merged([outcome.images[number].rows for outcome in ranks]) == image.rows, f"step {image.done}"


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_10_a_save_loads_and_goes_on_bitwise_on_any_number_of_ranks(runs: Runs, world_size: int) -> None:
    """Resume at another world size: what was saved is what is there, and the end is the end of the unbroken run."""
    (alone,) = runs[1]["saves"][0]
    for case, ranks in zip(reload_cases(alone, world_size), runs[world_size]["reloads"], strict=True):
        assert merged([outcome.images[0].rows for outcome in ranks]) == case.image.rows
        assert rows_of(ranks) == alone.rows, f"resumed after {case.image.done} steps"


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_10_what_several_ranks_saved_one_rank_loads(runs: Runs, world_size: int) -> None:
    """The way back: the images of several ranks, merged, go on to the same end on one."""
    (alone,) = runs[1]["saves"][0]
    for number in (0, 5):
        parts = [outcome.images[number] for outcome in runs[world_size]["saves"][1]]
        image = Image(merged([part.rows for part in parts]), parts[0].state, parts[0].done)
        config = OffloadConfig(depth=1, window_rows=JOBS["saves"].most_rows(1))
        assert run_case(Case(JOBS["saves"], config, image=image)).rows == alone.rows


@on_ranks
def test_12_steps_without_tokens_and_ranks_without_rows(runs: Runs, world_size: int) -> None:
    """Empty shards and zero ids: three rows in all, and steps that use none."""
    require_same_bits(runs, "nothing", world_size)
    assert rows_of(runs[world_size]["nothing"][0]).keys() == {0, 1, 2}


STEPS = st.lists(st.lists(st.integers(0, 30), max_size=9), min_size=1, max_size=12)


@settings(max_examples=40)
@given(steps=STEPS, depth=st.integers(0, 4), spare=st.integers(0, 4), seed=st.integers(0, 1000), verify=st.booleans())
def test_12_a_window_that_just_holds_each_step_is_enough_for_any_ids(
    steps: list[list[int]], depth: int, spare: int, seed: int, verify: bool
) -> None:
    """Capacity edge: any ids, any look-ahead, a window of exactly what the fullest step needs, or little more."""
    job = Job(
        tuple(tokens_of(ids) if ids else NOTHING for ids in steps),
        addresses=Addresses((29, 11)),
        skipped=frozenset({seed % 7}),
        evaluated=frozenset({seed % 5}),
        saved=frozenset({seed % 4}),
    )
    window = max(1, job.most_rows(1) + spare)
    outcome = run_case(Case(job, OffloadConfig(depth=depth, window_rows=window, verify=verify), seed))
    assert outcome.rows == reference_rows(job, EXACT_ADAM, 1)
    assert outcome.leaks == {}


@on_ranks
def test_13_ranks_that_stall_at_different_times_do_not_wait_for_each_other_forever(runs: Runs, world_size: int) -> None:
    """Deadlock: most rows are one rank's, each rank is delayed by a seed of its own; a hang ends the rank."""
    require_same_bits(runs, "skewed", world_size)
    if world_size > 1:
        stalls = [[outcome.seen.full for outcome in ranks] for ranks in runs[world_size]["skewed"]]
        assert any(any(ranks) for ranks in stalls), "no rank ever found its window full: the test would prove nothing"


def test_15_a_row_used_after_any_gap_is_what_dense_adam_makes_of_it() -> None:
    """Catch-up: bitwise torch.optim.Adam over the whole table, gaps of 1 to 400 steps, a rate that rises and falls."""
    gaps = (1, 2, 3, 17, 150, 400)
    used_at = {token: {0, gap, gap + 1} for token, gap in enumerate(gaps)}
    ids = [[token for token, steps in used_at.items() if step in steps] + [50] for step in range(max(gaps) + 2)]
    rates = tuple(0.01 * min(step + 1, 40) / 40 * (1 - step / 500) for step in range(len(ids)))
    job = Job(tuple(tokens_of(step) for step in ids), exact=True, learning_rates=rates)
    tables = open_tables(Case(job, OffloadConfig(depth=2, window_rows=job.most_rows(1))))
    num_rows = sum(job.addresses.sizes)
    dense_RD = initial_rows(torch.arange(num_rows), DIM, seed=SEED, std=0.02).requires_grad_()
    optimizer = torch.optim.Adam([dense_RD], betas=(EXACT_ADAM.beta1, EXACT_ADAM.beta2), eps=1e-8, fused=True)
    try:
        for step in range(len(ids)):
            ((tokens, _),) = job.batches(step, 0, 1)
            rows = [job.addresses.rows(m, tokens).flatten() + m * job.addresses.sizes[0] for m in range(2)]
            begun, (seen,) = use_rows(tables, job, step)
            assert float(seen.detach()) == float(sum(job.loss(dense_RD[rows[m]], tokens, m) for m in range(2)).detach())
            seen.backward()
            begun.reduce()
            begun.apply(lr=rates[step])
            optimizer.zero_grad()
            sum(job.loss(dense_RD[rows[m]], tokens, m) for m in range(2)).backward()
            optimizer.param_groups[0]["lr"] = EXACT_ADAM.lr_factor * rates[step]
            optimizer.step()
        last = [Tokens(torch.tensor([ids[-1]]), torch.zeros(1, len(ids[-1]), dtype=torch.int64))]
        for module, leaf in enumerate(tables.look_up(last).values):
            rows = job.addresses.rows(module, last[0][0]).unique() + module * job.addresses.sizes[0]
            assert torch.equal(leaf, dense_RD.detach()[rows])
    finally:
        tables.close()
