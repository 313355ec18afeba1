"""`engram bench`."""

import click

from launch.commands.bench_jobs import everything, trace, train
from launch.commands.bench_parts import checkpoint, data, kernels, links, offload


@click.group(commands=[offload, kernels, links, checkpoint, data, train, trace, everything])
def command() -> None:
    """Measure parts of the machinery on this machine."""
