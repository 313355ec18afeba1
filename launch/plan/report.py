"""The figures as tables for people."""

from rich.console import Console
from rich.table import Table

from launch.plan.figures import Figures
from offload.host.limits import size_text

_LABELS = {
    "attention": "attention",
    "dense_ffn": "dense feed-forward networks",
    "routed_experts": "routed experts",
    "shared_experts": "shared experts",
    "routers": "routers",
    "norms": "norms",
    "hyper_connections": "hyper-connections",
    "engram_projections": "Engram projections",
    "engram_vectors": "Engram norms, convolutions",
    "engram_tables": "Engram tables",
    "input_embedding": "input embedding",
    "output_head": "output head",
}
_ACTIVE = (
    "active: without the input embedding, of which a token reads one row, without the experts that it does not visit",
    "and the table rows that it does not read",
)
_FLOPS = (
    "matrices: 6 x active parameters in matrices; attention: 6 x layers x heads x (columns of a query and a value)",
    "x (T + 1) / 2 for a sequence of T tokens. After PaLM (arXiv 2204.02311, appendix B); model/flops.py tells what",
    "is not counted",
)


def show(figures: Figures, console: Console) -> None:
    """Prints all there is to say."""
    _show_parameters(figures, console)
    if figures.tables:
        _show_tables(figures, console)
        _show_memory(figures, console)
    _show_beside(figures, console)
    _show_flops(figures, console)


def _show_parameters(figures: Figures, console: Console) -> None:
    table = _table(f"Parameters of {figures.job.run.name}", "part", "total", "active a token", "total, exactly")
    for name, label in _LABELS.items():
        part = figures.parts[name]
        if part.total:
            table.add_row(label, _count(part.total), _count(part.active), f"{part.total:,}")
    table.add_section()
    table.add_row("all", _count(figures.total), _count(figures.active), f"{figures.total:,}")
    console.print(table)
    total, active = figures.non_embedding
    lines = [
        *_ACTIVE,
        f"active with the input embedding: {_count(figures.active_with_embedding)}",
        f"without input embedding and head: {_count(total)}, {_count(active)} of them active",
    ]
    ratio = figures.allocation_ratio
    if ratio is not None:
        lines.append(f"allocation ratio rho, the routed experts' share of the inactive: {ratio:.1%}{_experts(figures)}")
    _print(console, *lines)


def _experts(figures: Figures) -> str:
    moe = figures.job.model.moe
    return f" ({moe.num_experts} experts, {moe.experts_per_token} a token)" if moe else ""


def _show_tables(figures: Figures, console: Console) -> None:
    table = _table("Rows of the Engram tables", "layer", "rows", "parameters", "n-grams", "rows of each head")
    for each in figures.tables:
        table.add_section()
        start = (str(each.layer), f"{each.rows:,}", _count(each.parameters))
        for order, heads in each.heads.items():
            table.add_row(*start, str(order), ", ".join(f"{rows:,}" for rows in heads))
            start = ("", "", "")
    console.print(table)
    _print(console, "layers count from 0; a head has the next prime number of rows that no other head has")


def _show_memory(figures: Figures, console: Console) -> None:
    ranks = figures.ranks
    shard = f"a rank of {ranks}"
    table = _table(
        "Host memory of the tables, every row touched", "optimizer", "weights", "state", "a row", "padded", "all", shard
    )
    for memory in figures.host_memory:
        table.add_row(
            ", ".join(memory.optimizers),
            memory.row_dtype,
            memory.state_dtype,
            f"{memory.record_bytes:,} B",
            f"{memory.padded_bytes:,} B",
            size_text(memory.bytes),
            size_text(memory.bytes_per_rank),
            style="bold" if memory.chosen else None,
        )
    console.print(table)
    if figures.window:
        held, offload = figures.window, figures.job.offload
        place = "window" if held.mode == "window" else "shard (offload.mode=resident: nothing is in host memory)"
        _print(
            console,
            "padded for a GPU's transfers; on a CPU records lie side by side",
            f"this job: {offload.optimizer.type}, {offload.row_dtype} weights, {offload.optimizer.state_dtype} state",
            f"{place} on each rank's device: {held.rows_per_rank:,} rows, {size_text(held.bytes_per_rank)}",
        )


def _show_beside(figures: Figures, console: Console) -> None:
    beside = figures.beside
    kept = {
        "update counts, a byte a row": beside.update_counts,
        "saves beside training, a copy of its part of the backbone and its optimizer's state": beside.backbone_copy,
        "saves beside training, rows as they were (checkpoint.undo_bytes), at most": beside.undo,
    }
    lines = [f"{what}: {size_text(nbytes)}" for what, nbytes in kept.items() if nbytes]
    if lines:
        _print(console, f"also in host memory, on a rank of {figures.ranks}:", *(f"  {line}" for line in lines))


def _show_flops(figures: Figures, console: Console) -> None:
    flops, train, length = figures.flops, figures.job.train, figures.job.data.sequence_length
    table = _table("FLOPs, forward and backward", "", "matrices", "attention", "all")
    for what, tokens in (
        ("a token", 1),
        (f"a step of {_count(figures.step_tokens)} tokens", figures.step_tokens),
        (f"the run of {train.steps:,} steps", figures.step_tokens * train.steps),
    ):
        table.add_row(what, *(_count(number * tokens) for number in (*flops, flops.total)))
    console.print(table)
    _print(console, *_FLOPS, f"T = {length:,}")


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column(first)
    for heading in others:
        table.add_column(heading, justify="right")
    return table


def _print(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(f"  {line}", markup=False, soft_wrap=not console.is_terminal)
    console.print()


def _count(number: int) -> str:
    for size, unit in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return str(number)
