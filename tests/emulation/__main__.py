"""Emulates training steps of a job: `python -m tests.emulation configs/bench.yaml --depths 0,1,2,4`."""

import gc

import click

from launch.commands.numbers import NumberList
from tests.emulation.hardware import Hardware, read_hardware
from tests.emulation.report import depths_table, heading, variants_table
from tests.emulation.results import TODAY, Run, Variant
from tests.emulation.run import run
from tests.emulation.workload import Part, Workload
from train.config.file import load
from train.config.job import JobConfig
from train.errors import UserError

_ALL = {
    "programs": 4,
    "values_aside": True,
    "rows_before_backbone": True,
}
VARIANTS = {
    "engine mixed": Variant(engine="mixed"),
    "engine mixed, 4 programs": Variant(engine="mixed", programs=4),
    "engine staged": Variant(engine="staged"),
    "slots decided in the loop": Variant(decided_in_loop=True),
    "4 programs a copy": Variant(programs=4),
    "values on a side stream": Variant(values_aside=True),
    "gradients sent after backward": Variant(gradients_late=True),
    "rows before backbone": Variant(rows_before_backbone=True),
    "4 programs, values, rows": Variant(**_ALL),  # type: ignore[arg-type]
}


@click.command()
@click.argument("config")
@click.argument("overrides", nargs=-1)
@click.option("--depths", type=NumberList(0), default="0,1,2,4", show_default=True, help="Look-aheads.")
@click.option("--machine", default="h200", show_default=True, help="Whose numbers, of launch/plan/hardware.yaml.")
@click.option(
    "--engine",
    type=click.Choice(["zero_copy", "staged", "mixed"]),
    default="zero_copy",
    show_default=True,
    help="That carries rows.",
)
@click.option("--ranks", default=1, show_default=True, help="Emulates one of so many ranks.")
@click.option("--scale", default=1, show_default=True, help="Emulates a step's 1/SCALE, and multiplies its times.")
@click.option("--steps", default=8, show_default=True, help="That count.")
@click.option("--warmup", default=16, show_default=True, help="Steps before them, in which the window fills.")
@click.option("--variants", type=int, help="Also what changes of the code would do, at this look-ahead.")
def main(
    config: str,
    overrides: tuple[str, ...],
    depths: tuple[int, ...],
    machine: str,
    engine: str,
    ranks: int,
    scale: int,
    steps: int,
    warmup: int,
    variants: int | None,
) -> None:
    """Emulates training steps of CONFIG on a machine that is not here: the tables' real code, on virtual clocks."""
    try:
        job, hardware = load(config, list(overrides), JobConfig), read_hardware(machine)
        workload = Workload(job, Part(ranks, scale), hardware)
        click.echo(heading(config, machine, workload))
        _emulate(workload, hardware, depths, variants, Variant(engine=engine), warmup=warmup, steps=steps)
    except (UserError, ValueError) as error:  # a window that is too small is a ValueError, too
        raise click.ClickException(str(error)) from None


def _emulate(
    workload: Workload,
    hardware: Hardware,
    depths: tuple[int, ...],
    variants: int | None,
    carried: Variant,
    *,
    warmup: int,
    steps: int,
) -> None:
    def emulated(depth: int | None, variant: Variant = TODAY) -> Run:
        gc.collect()  # the last run's tables
        return run(workload, hardware, depth, warmup=warmup, steps=steps, variant=variant)

    scale = workload.part.scale
    residents = {TODAY: (resident := emulated(None))}
    runs = {depth: emulated(depth, carried) for depth in depths}
    click.echo(depths_table(resident, runs, scale))
    if variants is not None:
        today = runs[variants] if variants in runs else emulated(variants, carried)
        pairs = {"today" if carried == TODAY else carried.engine: (resident, today)}
        for name, variant in VARIANTS.items():
            if (alike := variant.resident) not in residents:
                residents[alike] = emulated(None, alike)
            pairs[name] = residents[alike], emulated(variants, variant)
        click.echo(variants_table(pairs, variants, scale))


if __name__ == "__main__":
    main()
