"""`engram plan`."""

import json
import sys
from pathlib import Path

import click

_WIDTH = 80
_UNITS = {"K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}


class _Count(click.ParamType):
    """A whole number, or one with a unit: 300B, 1.5T."""

    name = "N[K|M|B|T]"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Reads an option's value; click calls it."""
        text = str(value).strip().upper()
        unit = _UNITS.get(text[-1:], 1)
        try:
            number = float(text.rstrip("KMBGT").replace("_", "")) * unit
        except ValueError:
            self.fail(f"{value!r} is no number of tokens, such as 300B or 1T.", param, ctx)
        if not 1 <= number <= 1e18:
            self.fail(f"{value!r} is not between 1 and 10^18 tokens.", param, ctx)
        return round(number)


@click.command(
    epilog="""\b
Examples:
  engram plan configs/paper/engram-27b.yaml
  engram plan configs/paper/engram-27b.yaml offload.row_dtype=bf16 \\
      --nodes 8 --gpu h200 --network ib400 --tokens 1T --price-per-gpu-hour 2.5
"""
)
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
@click.option("--nodes", type=click.IntRange(1, 1 << 16), default=1, show_default=True, help="Machines.")
@click.option("--gpus-per-node", type=click.IntRange(1, 64), default=8, show_default=True, help="GPUs, a rank each.")
@click.option("--gpu", default="h100", show_default=True, help="Whose numbers, of launch/plan/hardware.yaml.")
@click.option("--network", help="Between nodes: ib400, ib200, roce, ethernet.")
@click.option("--hardware", metavar="FILE", help="YAML of your own numbers, laid over the project's.")
@click.option("--tokens", type=_Count(), help="To train on, such as 1T; the config's steps otherwise.")
@click.option("--price-per-gpu-hour", "price", type=click.FloatRange(0), help="In any currency.")
@click.option("--zipf", type=click.FloatRange(0.1, 4), help="Draw tokens by this law, not the job's own text.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def command(
    config: str,
    overrides: tuple[str, ...],
    nodes: int,
    gpus_per_node: int,
    gpu: str,
    network: str | None,
    hardware: str | None,
    tokens: int | None,
    price: float | None,
    zipf: float | None,
    as_json: bool,
) -> None:
    """Tell what the job of CONFIG takes, before anything is paid.

    CONFIG is a YAML file or a run's folder. Told are its parameters, the memory of a GPU and a node, what crosses
    bus and network, a step's time by a stated cost model, days, cost, and what to set. Rows are those of the job's own
    text if it is here, else of tokens drawn by Zipf's law. The job is not built: it takes no GPU and little memory.
    """
    from launch.plan.bounds import check_sizes
    from launch.plan.cluster import Cluster
    from launch.plan.hardware import read_catalogue
    from train.config.file import load
    from train.config.job import JobConfig
    from train.run_folder import CONFIG_FILE

    path = str(Path(config, CONFIG_FILE)) if Path(config, CONFIG_FILE).is_file() else config
    job = load(path, overrides, JobConfig)  # before what takes seconds to import
    numbers = read_catalogue(hardware)
    joined = None if network is None else numbers.network(network)
    cluster = Cluster(nodes, gpus_per_node, numbers.gpu(gpu), joined, gpu)
    check_sizes(job, cluster.ranks)

    from rich.console import Console

    from launch.plan.answer import to_json
    from launch.plan.assessment import assess
    from launch.plan.report import show
    from launch.plan.report_machines import show_machines

    def told(step: int, of: int) -> None:
        if sys.stderr.isatty():
            click.echo(f"\rreplaying step {step + 1} of {of} ...", nl=False, err=True)

    found = assess(job, cluster, tokens=tokens, price=price, zipf=zipf, told=told)
    if sys.stderr.isatty():
        click.echo("\r\033[K", nl=False, err=True)
    if as_json:
        click.echo(json.dumps(to_json(found), indent=2))
        return
    console = Console(highlight=False)
    console = Console(highlight=False, width=min(_WIDTH, console.width) if console.is_terminal else _WIDTH)
    show(found.figures, console)
    show_machines(found, console)
