"""What a job takes of machines, as tables for people: memory, traffic, time, what to set."""

from collections.abc import Callable, Sequence

from rich.console import Console

from launch.console import count_text, print_lines, seconds_text, table_of
from launch.plan.assessment import Assessment, bytes_a_step
from launch.plan.memory.budgets import Budget, device_budget, host_budget
from launch.plan.rows.traffic import DEPTHS
from offload.host.limits import size_text

_PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "master weights, optimizer state",
    "activations": "activations",
    "buffers": "buckets, gathered parameters, Muon",
    "gathered": "gloo's copies of gathered parameters",
    "kept": "kept by the C library",
    "cuda": "CUDA, NCCL (assumed)",
    "window": "window, or resident shard",
    "step_rows": "a step's rows and gradients",
    "plans": "plans of steps",
    "staging": "staging buffers",
    "processes": "processes (assumed)",
    "saved_backbone": "a save: copy of the backbone",
    "undo_log": "a save: undo log, at most",
    "saved_counts": "a save: copy of the update counts",
    "table_weights": "tables: weights",
    "table_states": "tables: optimizer state, padding",
    "update_counts": "tables: update counts",
    "directory": "directory of the window",
}
_STEP = {
    "model": "model, forward and backward",
    "reduce": "gradients and parameters",
    "experts": "tokens to experts",
    "optimizer": "backbone's optimizer",
    "exchange": "rows' values and gradients",
    "rows": "rows' reads and updates",
    "interference": "lost to copies of rows",
    "threads": "threads beside the loop, on its core",
}


def show_machines(found: Assessment, console: Console) -> None:
    """Prints all of it."""
    cluster = found.cluster
    where = f"{cluster.nodes} x {cluster.gpus_per_node} {cluster.gpu}"
    _show_budget(found, f"A GPU's memory, of {where}", found.device, device_budget, console)
    _show_budget(found, "A node's host memory, every row touched", found.host, host_budget, console)
    if found.rows is not None:
        _show_rows(found, console)
    _show_step(found, console)
    _show_budgeted(found, console)


def show_phases(phases: Sequence[Assessment], console: Console) -> None:
    """Prints what each phase takes, and all of them; the tables above are those of the longest sequences."""
    table = table_of("Phases", "", "steps", "tokens a sequence", "a step", "tokens", "days")
    for number, found in enumerate(phases, start=1):
        job = found.job
        table.add_row(
            f"phase {number}",
            f"{job.train.steps:,}",
            f"{job.data.sequence_length:,}",
            seconds_text(found.seconds),
            count_text(found.tokens),
            f"{found.days:,.1f}",
        )
    table.add_section()
    steps, tokens = (sum(part) for part in zip(*((f.job.train.steps, f.tokens) for f in phases), strict=True))
    table.add_row("all", f"{steps:,}", "", "", count_text(tokens), f"{sum(found.days for found in phases):,.1f}")
    console.print(table)
    costs = [found.cost for found in phases if found.cost is not None]
    print_lines(
        console,
        "memory, rows, time and days above are those of the phase with the longest sequences",
        *([f"all phases cost {sum(costs):,.0f}"] if costs else []),
    )


def _show_budget(found: Assessment, title: str, budget: Budget, of: Callable[..., Budget], console: Console) -> None:
    table = table_of(title, "part", "bytes")
    for name, nbytes in budget.parts.items():
        if nbytes:
            table.add_row(_PARTS[name], size_text(round(nbytes)))
    table.add_section()
    table.add_row("all", size_text(round(budget.total)))
    table.add_row("usable", size_text(round(budget.capacity)))
    console.print(table)
    if budget.free >= 0:
        print_lines(console, f"fits; {size_text(round(budget.free))} left")
        return
    change = found.change(of, budget)
    mend = f"{change.setting} makes it fit" if change else "no single change that is known makes it fit"
    print_lines(console, f"DOES NOT FIT: {size_text(round(-budget.free))} too much; {mend}")


def _show_rows(found: Assessment, console: Console) -> None:
    replayed, rows = found.replayed, found.rows
    assert replayed is not None
    assert rows is not None
    assert found.planned is not None
    table = table_of("Rows of a step", "", "mean rank", "busiest rank")
    for label, of in (
        ("rows of its shard that a step uses", lambda owner: owner.owned),
        ("rows that ranks ask of it", lambda owner: owner.asked),
        ("fetched into its window", lambda owner: owner.fetched),
    ):
        table.add_row(label, count_text(replayed.mean(of)), count_text(replayed.most(of)))
    hits = [owner.hit_rate for owner in replayed.owners if owner.hit_rate is not None]
    if hits:
        table.add_row("hit rate", f"{sum(hits) / len(hits):.1%}", f"{min(hits):.1%}")
    table.add_section()
    for name, nbytes in bytes_a_step(found).items():
        table.add_row(_BYTES[name], "", size_text(round(nbytes)))
    console.print(table)
    exact = "" if replayed.thinned == 1 else f", one row of {replayed.thinned} of each shard, times {replayed.thinned}"
    fits = [] if replayed.fits else [f"a window of {found.job.offload.window_rows:,} rows does not hold a step"]
    print_lines(
        console,
        *fits,
        f"from {replayed.stream}: the last {replayed.steps} of {replayed.steps + replayed.warmup} steps replayed "
        f"by the real planner and directory, {len(replayed.owners)} of {replayed.ranks} ranks{exact}",
        f"planning took this machine {found.planned.seconds * 1e9:.0f} ns of a core a lookup",
    )


_BYTES = {
    "pcie_in": "bus, host to GPU, a rank",
    "pcie_out": "bus, GPU to host, a rank",
    "dram": "host memory of a node",
    "exchange_values": "values of rows, sent by a rank",
    "exchange_gradients": "gradients of rows, sent by a rank",
    "network": "rows through a node's ports",
}


def _show_step(found: Assessment, console: Console) -> None:
    stages, depth = found.time.stages, found.depth
    table = table_of("A step's time, estimated", "part", "time", "share")
    for name, seconds in found.time.parts.items():
        if seconds:
            table.add_row(_STEP[name], seconds_text(seconds), f"{seconds / found.seconds:.1%}")
    stall = stages.stall(depth)
    table.add_row(f"waiting for rows (depth {depth})", seconds_text(stall), f"{stall / found.seconds:.1%}")
    table.add_section()
    table.add_row("a step", seconds_text(found.seconds), "")
    console.print(table)
    bound = "the GPU" if found.time.compute >= found.time.launches else "the host, which launches"
    lines = [
        f"the model is bound by {bound}: {seconds_text(found.time.compute)} of computing, "
        f"{seconds_text(found.time.launches)} of launches"
    ]
    if found.rows is not None:
        lines += [
            f"beside it: {seconds_text(stages.plan)} to plan, {seconds_text(stages.decide)} to decide on slots, "
            f"{seconds_text(stages.fetch)} to fetch, {seconds_text(stages.write_back)} to write back",
            "stall by depth: "
            + ", ".join(f"{each}: {stages.stall(each) / stages.period(each):.1%}" for each in DEPTHS),
        ]
    print_lines(console, *lines, "the cost model: launch/plan/step_time.py, stall.py; rates: launch/plan/hardware.yaml")


def _show_budgeted(found: Assessment, console: Console) -> None:
    cost = "" if found.cost is None else f", {found.cost:,.0f} for GPUs"
    lines = [
        f"{count_text(found.tokens_per_second)} tokens/s; {count_text(found.tokens)} tokens take "
        f"{seconds_text(found.days * 86400)}{cost}"
    ]
    if (advice := found.advice) is not None:
        size = f" offload.window_rows={advice.window_rows}" if advice.mode == "window" else ""
        engine = f" offload.engine={advice.engine}" if advice.mode == "window" else ""
        lines += [
            f"recommended: offload.mode={advice.mode} offload.depth={advice.depth}{size}{engine}",
            f"because {advice.reason}",
        ]
    print_lines(console, *lines)
