"""`engram plan`."""

from pathlib import Path

import click

from launch.commands import plan_runs
from launch.commands.numbers import Finite, NumberList, UnitNumber


@click.command(
    short_help="Tell what a job takes, before it is paid for.",
    epilog="""\b
Examples:
  engram plan configs/paper/engram-27b.yaml
  engram plan configs/paper/engram-27b.yaml offload.row_dtype=bf16 \\
      --nodes 8 --gpu h200 --network ib400 --tokens 1T --price-per-gpu-hour 2.5
""",
)
@click.argument("config", required=False)
@click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
@click.option("--nodes", type=click.IntRange(1, 1 << 16), default=1, show_default=True, help="Machines.")
@click.option("--gpus-per-node", type=click.IntRange(1, 64), default=8, show_default=True, help="GPUs, a rank each.")
@click.option("--gpu", default="h100", show_default=True, help="Kind of GPU, of those in launch/plan/hardware.yaml.")
@click.option("--network", help="What joins the nodes: ib400, ib200, roce, ethernet.")
@click.option("--hardware", metavar="FILE", help="YAML of your own numbers, laid over the project's.")
@click.option("--tokens", type=UnitNumber(), help="Tokens to train on, such as 1T; default: the config's steps.")
@click.option("--price-per-gpu-hour", "price", type=Finite(0), help="Price, in any currency.")
@click.option("--zipf", type=Finite(0.1, 4), help="Draw tokens with this exponent instead of the job's own text.")
@click.option("--simulate", is_flag=True, help="Replay the job at many world sizes instead.")
@click.option(
    "--worlds",
    type=NumberList(1, 4096),
    default="8,64,512,4096",
    show_default=True,
    help="World sizes for --simulate, in ranks.",
)
@click.option(
    "--sequences-per-rank", "growing", type=click.IntRange(1, 4096), default=8, show_default=True,
    help="Size of the batch that grows with the world.",
)  # fmt: skip
@click.option("--calibrate", metavar="FILE", help="Measure this machine and write its numbers, for --hardware.")
@click.option("--plot", metavar="FILE", help="Also draw what is simulated, as PNG or SVG (matplotlib).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def command(
    config: str | None,
    overrides: tuple[str, ...],
    nodes: int,
    gpus_per_node: int,
    gpu: str,
    network: str | None,
    hardware: str | None,
    tokens: int | None,
    price: float | None,
    zipf: float | None,
    simulate: bool,
    worlds: tuple[int, ...],
    growing: int,
    calibrate: str | None,
    plot: str | None,
    as_json: bool,
) -> None:
    """Tell what the job of CONFIG takes, before anything is paid for.

    CONFIG is a YAML file or a run's folder. The answer has its parameters, the memory of a GPU and a node, what crosses
    bus and network, a step's time by a stated cost model, days, cost, and what to set. Rows are those of the job's own
    text if it is here, else of tokens drawn by Zipf's law. The job is not built: this takes no GPU and little memory.
    --simulate replays its rows at many world sizes instead, for the batch as it is and for one that grows with them;
    --calibrate, which needs no CONFIG, measures this machine's processor as if it were a GPU, named `here`.
    """
    from launch.plan.bounds import check_simulated, check_sizes
    from launch.plan.cluster import Cluster
    from launch.plan.hardware import read_catalogue
    from train.config.file import load
    from train.config.job import JobConfig
    from train.run_folder import CONFIG_FILE

    if calibrate is not None:
        plan_runs.calibrate(Path(calibrate))
        return
    if config is None:
        raise click.UsageError("Missing argument 'CONFIG'.")
    path = str(Path(config, CONFIG_FILE)) if Path(config, CONFIG_FILE).is_file() else config
    job = load(path, overrides, JobConfig)  # before what takes seconds to import
    numbers = read_catalogue(hardware)
    hardware_of = numbers.gpu(gpu)
    if simulate:
        check_simulated(job, worlds, growing, plot)
        plan_runs.simulate(job, worlds, growing, gpus_per_node, hardware_of, numbers.network(network or "ib400"), zipf,
                           plot, as_json=as_json)  # fmt: skip
        return
    joined = None if network is None else numbers.network(network)
    cluster = Cluster(nodes, gpus_per_node, hardware_of, joined, gpu)
    check_sizes(job, cluster.ranks)
    plan_runs.assess(job, cluster, tokens, price, zipf, as_json=as_json)
