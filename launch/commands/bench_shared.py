"""What the commands of `engram bench` share: options, measuring and printing."""

from collections.abc import Callable
from json import dumps
from typing import TYPE_CHECKING, Any, Literal

import click

from launch.commands.numbers import Finite

if TYPE_CHECKING:
    from rich.console import Console

    from launch.bench.options import BenchOptions
    from launch.bench.report import Section

_WIDTH = 180  # of a table that no terminal shows
_DEVICES = ("auto", "cpu", "cuda")

Device = Literal["auto", "cpu", "cuda"]
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
device: Decorator = click.option(
    "--device", type=click.Choice(_DEVICES), default="auto", show_default=True, help="auto: the GPU, if there is one."
)
seconds: Decorator = click.option(
    "--seconds", type=Finite(min=0), help="Time limit; what does not fit is left out. Default: none."
)
threads: Decorator = click.option(
    "--threads", type=click.IntRange(min=1), help="PyTorch threads; default: one per core."
)
json: Decorator = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")


def thread_count(threads: int | None) -> int:
    """The number, or that of the cores for None."""
    from offload.host.cores import usable_cores

    return threads or usable_cores()


def console() -> "Console":
    """Standard output, wide where it is not a terminal."""
    from rich.console import Console

    shown = Console(highlight=False)
    return shown if shown.is_terminal else Console(highlight=False, width=_WIDTH)


def measure(parts: tuple[str, ...], *, device: Device, threads: int | None, as_json: bool, **chosen: Any) -> None:
    """Measures the parts, with options named as in `BenchOptions`, and prints what they found."""
    from launch.bench.devices import chosen_device
    from launch.bench.options import BenchOptions
    from launch.bench.run import run_parts

    options = BenchOptions(device=chosen_device(device), threads=thread_count(threads), **chosen)
    tell(run_parts(parts, options), options, as_json)


def tell(sections: "dict[str, Section]", options: "BenchOptions", as_json: bool) -> None:
    """Prints what was found, as tables or as one JSON object."""
    from launch.bench.report import answer

    if as_json:
        click.echo(dumps(answer(sections, options), indent=2))
        return
    shown = console()
    for section in sections.values():
        section.show(shown)
