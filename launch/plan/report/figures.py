"""What the model and its tables are, as tables for people. Nothing is wider than the console."""

from rich.console import Console

from launch.console import count_text, print_lines, table_of
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
    "active: without the input embedding, of which a token reads one row, without the experts that it does not visit "
    "and the table rows that it does not read"
)
_FLOPS = (
    "matrices: 6 x active parameters in matrices; attention: 6 x layers x heads x (columns of a query and a value) "
    "x (T + 1) / 2 for a sequence of T tokens. After PaLM (arXiv 2204.02311, appendix B); model/flops.py tells what "
    "is not counted"
)


def show(figures: Figures, console: Console) -> None:
    """Prints what the model and its tables are."""
    _show_parameters(figures, console)
    if figures.tables:
        _show_tables(figures, console)
        _show_memory(figures, console)
    _show_flops(figures, console)


def _show_parameters(figures: Figures, console: Console) -> None:
    table = table_of(f"Parameters of {figures.job.run.name}", "part", "total", "active a token", "total, exactly")
    for name, label in _LABELS.items():
        part = figures.parts[name]
        if part.total:
            table.add_row(label, count_text(part.total), count_text(part.active), f"{part.total:,}")
    table.add_section()
    table.add_row("all", count_text(figures.total), count_text(figures.active), f"{figures.total:,}")
    console.print(table)
    total, active = figures.non_embedding
    lines = [
        _ACTIVE,
        f"active with the input embedding: {count_text(figures.active_with_embedding)}",
        f"without input embedding and head: {count_text(total)}, {count_text(active)} of them active",
    ]
    ratio = figures.allocation_ratio
    if ratio is not None:
        lines.append(f"allocation ratio rho, the routed experts' share of the inactive: {ratio:.1%}{_experts(figures)}")
    print_lines(console, *lines)


def _experts(figures: Figures) -> str:
    moe = figures.job.model.moe
    return f" ({moe.num_experts} experts, {moe.experts_per_token} a token)" if moe else ""


def _show_tables(figures: Figures, console: Console) -> None:
    table = table_of("Rows of the Engram tables", "layer", "rows", "parameters", "n-grams", "rows of each head")
    for each in figures.tables:
        table.add_section()
        start = (str(each.layer), f"{each.rows:,}", count_text(each.parameters))
        for order, heads in each.heads.items():
            table.add_row(*start, str(order), ", ".join(f"{rows:,}" for rows in heads))
            start = ("", "", "")
    console.print(table)
    print_lines(console, "layers count from 0; a head has the next prime number of rows that no other head has")


def _show_memory(figures: Figures, console: Console) -> None:
    ranks = figures.ranks
    shard = f"a rank of {ranks}"
    title = "Host memory of the tables, every row touched"
    table = table_of(title, "optimizer", "weights", "state", "a row", "all", shard)
    for memory in figures.host_memory:
        table.add_row(
            ", ".join(memory.optimizers),
            memory.row_dtype,
            memory.state_dtype,
            f"{memory.padded_bytes:,} B",
            size_text(memory.bytes),
            size_text(memory.bytes_per_rank),
            style="bold" if memory.chosen else None,
        )
    console.print(table)
    if figures.window:
        held, offload = figures.window, figures.job.offload
        place = "window" if held.mode == "window" else "shard (offload.mode=resident: nothing is in host memory)"
        print_lines(
            console,
            "rows are padded for a GPU's transfers; on a CPU records lie side by side",
            f"this job: {offload.optimizer.type}, {offload.row_dtype} weights, {offload.optimizer.state_dtype} state",
            f"{place} on each rank's device: {held.rows_per_rank:,} rows, {size_text(held.bytes_per_rank)}",
        )


def _show_flops(figures: Figures, console: Console) -> None:
    flops, train, length = figures.flops, figures.job.train, figures.job.data.sequence_length
    table = table_of("FLOPs, forward and backward", "", "matrices", "attention", "all")
    for what, tokens in (
        ("a token", 1),
        (f"a step of {count_text(figures.step_tokens)} tokens", figures.step_tokens),
        (f"the run of {train.steps:,} steps", figures.step_tokens * train.steps),
    ):
        table.add_row(what, *(count_text(number * tokens) for number in (*flops, flops.total)))
    console.print(table)
    print_lines(console, _FLOPS, f"T = {length:,}")
