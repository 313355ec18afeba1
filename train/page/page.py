"""The page: figures, tables of numbers, configs, and the style that makes them readable on any screen."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from train.errors import UserError
from train.page.figures import sections
from train.page.told_run import ToldRun, flat
from train.report.comparison import contenders, open_runs

_STYLE = Path(__file__).with_name("page.css")
_LEFT_OUT = ("run.name", "run.dir")


def page(runs: Sequence[ToldRun], memory: Sequence[str] = ()) -> str:
    """The whole page as HTML.

    Args:
        runs: at least one.
        memory: what `train.page.memory_part` made of each.
    """
    title = ", ".join(run.name for run in runs)
    body = [f"<h1>{escape(title)}</h1>", _states(runs), _comparison(runs)]
    for heading, figures in sections(runs):
        if shown := [each for each in figures if each]:
            wide = " wide" if heading == "Timeline" else ""
            body.append(f'<h2>{heading}</h2><div class="figures{wide}">{"".join(shown)}</div>')
    if not any(run.records for run in runs):
        body.append("<p>No step was recorded yet.</p>")
    if any(memory):
        body.append(f"<h2>Memory</h2>{''.join(memory)}")
    body += [_skipped(runs), _machines(runs), _configs(runs)]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title>'
        f"<style>{_STYLE.read_text(encoding='utf-8')}</style></head><body>{''.join(body)}</body></html>\n"
    )


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table that scrolls by itself where it is too wide."""
    top = "".join(f"<th>{escape(head)}</th>" for head in heads)
    lines = "".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{top}</tr>{lines}</table></div>'


def _states(runs: Sequence[ToldRun]) -> str:
    rows = []
    for run in runs:
        status = run.status
        where = f"{status.host}, {status.ranks or '?'} ranks" if status.host else ""
        rows.append(
            (
                run.name,
                status.state,
                f"{max(status.step, int(run.last('step') or 0)):,} of {run.job.train.steps:,}",
                *(_number(run.last(key)) for key in ("loss", "val_loss", "tokens", "epoch", "tokens_per_s")),
                where,
                status.started or "",
            )
        )
    heads = ("run", "state", "step", "loss", "val loss", "tokens", "epoch", "tokens/s", "on", "started")
    reasons = [f"<p>{escape(run.name)}: {escape(run.status.why)}</p>" for run in runs if run.status.why]
    return table(heads, rows) + "".join(reasons)


def _comparison(runs: Sequence[ToldRun]) -> str:
    if len(runs) < 2:
        return ""
    try:
        opened, step = open_runs([run.folder for run in runs])
        found = contenders(opened)
    except UserError as error:
        return f"<p>Not compared: {escape(str(error))}</p>"
    at = "at their ends" if step is None else f"after step {step:,}"
    rows = []
    for each in found:
        gap, loss = each.gap("val_loss", found[0]), each.spread("val_loss")
        parameters = each.figure("parameters")
        rows.append(
            (each.name, len(each.runs), _number(parameters), _number(loss and loss.mean), _number(gap and gap.mean))
        )
    heads = ("run", "seeds", "parameters", "validation loss", f"to {found[0].name}")
    return f"<h2>Compared {at}</h2>{table(heads, rows)}"


def _skipped(runs: Sequence[ToldRun]) -> str:
    rows = [(run.name, skip["step"], skip["why"], skip["batch"]) for run in runs for skip in run.skipped[-50:]]
    return f"<h2>Skipped steps</h2>{table(('run', 'step', 'why', 'batch'), rows)}" if rows else ""


def _machines(runs: Sequence[ToldRun]) -> str:
    """A column for each run; a run of several hosts tells of rank 0's."""
    machines = [run.status.machine for run in runs]
    keys = dict.fromkeys(key for machine in machines for key in machine)
    rows = [(key.replace("_", " "), *(_value(machine.get(key)) for machine in machines)) for key in keys]
    return f"<h2>Machine of rank 0</h2>{table(('', *(run.name for run in runs)), rows)}" if rows else ""


def _configs(runs: Sequence[ToldRun]) -> str:
    """What each sets otherwise than its base, and where several differ."""
    values = [flat(run.job) for run in runs]
    keys = [key for key in dict.fromkeys(key for each in values for key in each) if key not in _LEFT_OUT]
    parts = []
    if len(runs) > 1:
        told = [(key, *(_value(each.get(key)) for each in values)) for key in keys]
        rows = [row for row in told if len({*row[1:]}) > 1]
        parts.append(f"<h2>What differs between them</h2>{table(('key', *(run.name for run in runs)), rows)}")
    for run, each in zip(runs, values, strict=True):
        base, name = run.base
        rows = [(key, _value(each.get(key)), _value(base.get(key))) for key in keys if each.get(key) != base.get(key)]
        whose = f" of {escape(run.name)}" if len(runs) > 1 else ""
        parts.append(f"<h2>Config{whose}: what differs from {escape(name)}</h2>{table(('key', run.name, name), rows)}")
    return "".join(parts)


def _value(value: Any) -> str:
    return "" if value is None else str(value)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.5g}"
