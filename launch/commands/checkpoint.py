"""`engram checkpoint`."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from train.checkpoint.differences import Difference
    from train.checkpoint.survey import Entry

_run = click.argument("run")
_step = click.option("--step", type=click.IntRange(min=1), help="That of this step alone; default: all.")
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")


@click.group()
def command() -> None:
    """List, verify, compare and prune a run's checkpoints."""


@command.command(
    "ls",
    short_help="List a run's checkpoints.",
    epilog="""\b
Examples:
  engram checkpoint ls runs/tiny
  engram checkpoint ls tiny --json
""",
)
@_run
@_json
def list_(run: str, as_json: bool) -> None:
    """List the checkpoints of RUN (a run's folder, or its name in runs/), checking sizes but not contents."""
    folder = _folder(run)

    from train.checkpoint.survey import survey

    _show(survey(folder, read=False), as_json)


@command.command(
    short_help="Read checkpoints and compare their checksums.",
    epilog="""\b
Examples:
  engram checkpoint verify runs/tiny
  engram checkpoint verify tiny --step 100
""",
)
@_run
@_step
@_json
def verify(run: str, step: int | None, as_json: bool) -> None:
    """Read every byte of the checkpoints of RUN and compare it with the checksums; exit code 1 if one is damaged."""
    folder = _folder(run)

    from train.checkpoint.survey import survey

    if _show(survey(folder, read=True, step=step), as_json):
        raise click.exceptions.Exit(1)


@command.command(
    short_help="Show how two checkpoints differ.",
    epilog="""\b
Examples:
  engram checkpoint diff runs/one runs/other
  engram checkpoint diff runs/tiny/checkpoints/step-00000100 runs/tiny/checkpoints/step-00000200
""",
)
@click.argument("first")
@click.argument("second")
@_json
def diff(first: str, second: str, as_json: bool) -> None:
    """Show how two checkpoints differ: for each part, how many values, and by how much at most.

    FIRST and SECOND are folders of checkpoints, or runs (folders, or names in runs/), whose newest is taken.
    """
    from train.checkpoint.listing import find_checkpoint

    paths = find_checkpoint(first, "FIRST"), find_checkpoint(second, "SECOND")

    from train.checkpoint.checked import Damaged
    from train.checkpoint.differences import differences
    from train.checkpoint.open import open_all
    from train.errors import UserError

    try:
        found = differences(*map(open_all, paths))
    except Damaged as error:
        raise UserError(f"{paths[0]} or {paths[1]}: {error}; see engram checkpoint verify") from None
    if as_json:
        click.echo(json.dumps({"first": str(paths[0]), "second": str(paths[1]), "parts": [vars(d) for d in found]}))
        return
    for part in found:
        click.echo(_told(part))


@command.command(
    short_help="Remove old checkpoints.",
    epilog="""\b
Examples:
  engram checkpoint prune runs/tiny --keep 1 --dry-run
  engram checkpoint prune tiny --keep 2 --keep-every 1000
""",
)
@_run
@click.option("--keep", type=click.IntRange(min=1), required=True, help="Newest good checkpoints to keep.")
@click.option("--keep-every", type=click.IntRange(min=1), help="Also keep those of steps that are a multiple of this.")
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@_json
def prune(run: str, keep: int, keep_every: int | None, dry_run: bool, as_json: bool) -> None:
    """Remove old checkpoints of RUN, once those to keep have been read and found intact.

    The newest always stays. Damaged ones are left alone, and do not count.
    """
    folder = _folder(run)

    from train.checkpoint.survey import prune as prune_run

    found = prune_run(folder, keep=keep, keep_every=keep_every, dry_run=dry_run)
    if as_json:
        click.echo(json.dumps(vars(found)))
        return
    for what, steps in (("would remove" if dry_run else "removed", found.removed), ("kept", found.kept)):
        click.echo(f"{what}: {', '.join(map(str, steps)) or 'none'}")
    if found.damaged:
        click.echo(f"damaged, left alone: {', '.join(map(str, found.damaged))}")


def _folder(run: str) -> Path:
    """The run's folder, found before what takes seconds to import."""
    from train.run_folder import find_run

    return find_run(run)


def _show(entries: Iterable["Entry"], as_json: bool) -> bool:
    """Prints checkpoints as they are checked; returns whether one is damaged."""
    seen: list[dict[str, Any]] = []
    for entry in entries:
        seen.append(vars(entry))
        if not as_json:
            click.echo(_line(entry))
            for fault in entry.faults:
                click.echo(f"  {fault}")
    if as_json:
        click.echo(json.dumps({"checkpoints": seen}, indent=2))
    return any(entry["faults"] for entry in seen)


def _line(entry: "Entry") -> str:
    if entry.bytes is None:
        return f"step {entry.step}: damaged"
    state = "damaged" if entry.faults else "whole" if entry.good else "whole, saved while steps were skipped"
    if entry.elsewhere and not entry.faults:
        state = f"{state} as far as it is here ({len(entry.elsewhere)} part(s) are on other nodes)"
    age = f", {entry.saved_at}" if entry.saved_at else ""
    since = f" since step {entry.base}" if entry.base else ""
    rows = f"{entry.rows:,} rows{since}"
    return f"step {entry.step}: {state}, {entry.bytes / 1e6:,.1f} MB, {rows}, {entry.ranks} rank(s){age}"


def _told(part: "Difference") -> str:
    told = f"all {part.compared:,} are equal"
    if part.differ:
        told = f"{part.differ:,} of {part.compared:,} differ, by {part.largest:.3g} at most"
    for count, where in ((part.only_first, "first"), (part.only_second, "second")):
        told += f", {count:,} are in the {where} only" if count else ""
    return f"{part.part}: {told}"
