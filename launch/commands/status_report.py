"""How runs are, for people."""

from collections.abc import Iterator
from itertools import groupby

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from offload.host.limits import size_text
from train.progress import duration
from train.status.pulse import Life
from train.status.status import RunStatus, rank_list

_STYLES = {"running": "green", "lost": "bold red", "failed": "bold red", "interrupted": "yellow"}
_MOST_HOSTS = 24


def shown(found: list[RunStatus]) -> RenderableType:
    """A page for one run, a table of several with the reasons below."""
    return _page(found[0]) if len(found) == 1 else _table(found)


def _page(status: RunStatus) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column()
    for name, value in _lines(status):
        grid.add_row(name, value)
    head = Text.assemble(status.run, "  ", (status.state, _STYLES.get(status.state, "")))
    return Group(head, grid)


def _lines(status: RunStatus) -> Iterator[tuple[str, RenderableType]]:
    if status.why:
        yield "why", Text(_last_line(status.why))
    if status.steps is not None:
        eta = f", {duration(status.eta_s)} to go" if status.eta_s is not None else ""
        yield "step", f"{status.step:,} of {status.steps:,} ({100 * status.step / status.steps:.0f} %){eta}"
    yield from _numbers(status.metrics)
    if status.saved_step is not None:
        yield "saved", f"step {status.saved_step:,}, {duration(status.saved_age_s or 0)} ago"
    elif status.steps is not None:
        yield "saved", "nothing yet"
    if status.active or status.state == "lost":
        yield "ranks", _ranks(status)


def _numbers(record: dict[str, float]) -> Iterator[tuple[str, str]]:
    """What the newest record says, as far as it says it."""
    groups = {
        "loss": [
            ("loss", "{:.4f}"),
            ("val_loss", f"validation {{:.4f}} (step {record.get('val_step', 0):,})"),
            ("grad_norm", "gradient norm {:.3g}"),
            ("skipped_steps", "{:,} steps skipped"),
        ],
        "rate": [("tokens_per_s", "{:,.0f} tokens/s"), ("step_ms", "{:,.0f} ms a step"), ("mfu", "{:.1%} MFU")],
        "data": [("epoch", "epoch {:.3f}"), ("tokens", "{:,} tokens seen")],
        "tables": [
            ("offload.stall_ms", "stall {:.1f} ms"),
            ("offload.hit_rate", "hit rate {:.1%}"),
            ("offload.fetch_rows", "{:,} rows in"),
            ("offload.writeback_rows", "{:,} out, a step"),
        ],
    }
    for name, parts in groups.items():
        told = [form.format(record[key]) for key, form in parts if key in record]
        if told:
            yield name, ", ".join(told)


def _ranks(status: RunStatus) -> RenderableType:
    """A line for each host, silent ranks first."""
    lives = sorted(status.lives, key=lambda life: (life.beat.host, life.silent, life.beat.rank))
    groups = [list(group) for _, group in groupby(lives, key=lambda life: (life.beat.host, life.silent))]
    groups.sort(key=lambda group: not group[0].silent)
    lines = [_host_line(group) for group in groups[:_MOST_HOSTS]]
    if len(groups) > _MOST_HOSTS:
        lines.append(Text(f"and {len(groups) - _MOST_HOSTS} more hosts"))
    if status.ranks is not None and len(lives) < status.ranks:
        lines.append(Text(f"{status.ranks - len(lives)} of {status.ranks} have no heartbeat that can be seen here"))
    return Group(*lines)


def _host_line(lives: list[Life]) -> Text:
    beats = [life.beat for life in lives]
    least, stages = min(beats, key=lambda beat: beat.step), sorted({beat.stage for beat in beats})
    parts = [
        f"{least.host}: {rank_list([beat.rank for beat in beats])}",
        f"step {least.step:,} {'/'.join(stages)}",
        f"{'silent' if lives[0].silent else 'heard'} {duration(max(life.age_s for life in lives))}"
        + ("" if lives[0].silent else " ago"),
    ]
    if any(beat.host_bytes for beat in beats):
        parts.append(f"host {size_text(sum(beat.host_bytes for beat in beats))}")
    if any(beat.device_peak_bytes for beat in beats):
        parts.append(f"device {size_text(max(beat.device_peak_bytes for beat in beats))}")
    return Text(", ".join(parts), style="red" if lives[0].silent else "")


def _table(found: list[RunStatus]) -> RenderableType:
    table = Table(box=None, pad_edge=False)
    table.add_column("run", overflow="fold")
    table.add_column("state")
    for heading in ("step", "loss", "val", "tokens/s", "to go", "saved"):
        table.add_column(heading, justify="right")
    for status in found:
        record = status.metrics
        table.add_row(
            status.run,
            Text(status.state, style=_STYLES.get(status.state, "")),
            f"{status.step:,}/{status.steps:,}" if status.steps is not None else "",
            *(format(record[key], form) if key in record else "" for key, form in _COLUMNS),
            duration(status.eta_s) if status.eta_s is not None else "",
            f"{status.saved_step:,}" if status.saved_step is not None else "",
        )
    why = [Text(f"{status.run}: {_last_line(status.why)}") for status in found if status.why]
    return Group(table, *why)


_COLUMNS = (("loss", ".4f"), ("val_loss", ".4f"), ("tokens_per_s", ",.0f"))


def _last_line(why: str) -> str:
    """Of a traceback, the error."""
    return why.strip().splitlines()[-1].strip() if why.strip() else ""
