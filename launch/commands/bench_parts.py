"""`engram bench offload`, `kernels`, `links`, `checkpoint` and `data`: pieces of the machinery, without a model."""

import tempfile
from pathlib import Path
from typing import Any

import click

from launch.bench.optimizers import OPTIMIZERS
from launch.commands import bench_shared as shared
from launch.commands.numbers import SEED, Finite, NumberList

PARTS = ("path", "scaling", "planning", "stall", "disk")
_MODES = ("window", "resident")


@click.command(
    short_help="Time tables in host memory against alternatives.",
    epilog="""\b
Examples:
  engram bench offload
  engram bench offload --optimizer rowwise-adagrad --lookups 65536 --json
  engram bench offload --part all
""",
)
@shared.device
@click.option("--part", type=click.Choice([*PARTS, "all"]), default="path", show_default=True, help="What to measure.")
@click.option("--lookups", type=click.IntRange(min=1), default=262_144, show_default=True, help="Lookups per step.")
@click.option("--rows", type=click.IntRange(min=2), default=4_000_000, show_default=True, help="Rows of the table.")
@click.option("--dim", type=click.IntRange(min=1), default=80, show_default=True, help="Columns of a row.")
@click.option(
    "--zipf",
    type=Finite(min=1, min_open=True),
    default=1.2,
    show_default=True,
    help="Exponent of the Zipf distribution of ids.",
)
@click.option("--steps", type=click.IntRange(min=1), default=20, show_default=True, help="Timed steps.")
@click.option(
    "--warmup", type=click.IntRange(min=1), default=5, show_default=True, help="Steps before those, not timed."
)
@click.option(
    "--optimizer",
    type=click.Choice([*OPTIMIZERS]),
    default="adam",
    show_default=True,
    help="Optimizer of our tables; part path also races others.",
)
@click.option("--mode", type=click.Choice(_MODES), default="window", show_default=True, help="Mode of our tables.")
@click.option("--depth", type=click.IntRange(0, 64), default=1, show_default=True, help="Look-ahead in steps.")
@click.option("--window-rows", type=click.IntRange(min=1), help="Slots of the window; default: what the depth needs.")
@click.option(
    "--compute-ms",
    type=Finite(min=0),
    default=100.0,
    show_default=True,
    help="Simulated computation of the model.",
)
@click.option(
    "--host-file", metavar="FOLDER", help="Folder on the disk of part disk; default: that of temporary files."
)
@click.option("--plain-allocator", is_flag=True, help="Use glibc's default allocator settings, not a CPU rank's.")
@shared.threads
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the ids.")
@shared.json
def offload(part: str, lookups: int, rows: int, dim: int, zipf: float, seed: int, **chosen: Any) -> None:
    """Time tables in host memory against common alternatives, on Zipf-distributed ids.

    \b
    Parts:
      path      lookup, backward and update, against PyTorch's SparseAdam and Adam and FBGEMM's embedding
      scaling   the same ids in a table of 64 times the rows
      planning  planning a step, relative to the step
      stall     waiting for rows by look-ahead, over an emulated link, on one and two ranks
      disk      the same with the tables in a file on a disk, under a step that computes as long as its reads take
    """
    from launch.bench.workload import Workload

    shared.measure(PARTS if part == "all" else (part,), workload=Workload(lookups, rows, dim, zipf, seed), **chosen)


@click.command(
    short_help="Time kernels against PyTorch and the hardware limit.",
    epilog="""\b
Examples:
  engram bench kernels
  engram bench kernels --tokens 4096 --seconds 60 --json
""",
)
@shared.device
@click.option("--tokens", type=click.IntRange(min=1), help="Tokens per step; default: 16,384 on a GPU, 1,024 on a CPU.")
@shared.seconds
@shared.threads
@shared.json
def kernels(**chosen: Any) -> None:
    """Time each kernel against PyTorch operations and the hardware limit.

    The limit is the bytes to move divided by the bandwidth of memory or bus, measured in the same run.
    On a CPU it times the functions that run there, at smaller sizes.
    """
    shared.measure(("kernels",), **chosen)


@click.command(
    short_help="Time record transfers between host and GPU.",
    epilog="""\b
Examples:
  engram bench links
  engram bench links --memory-mib 65536 --json
  engram bench links --programs 4,8,16 --record-bytes 160,512,964,1024
""",
)
@shared.device
@click.option(
    "--memory-mib",
    type=click.IntRange(min=4),
    help="Host memory to copy from and to; default: 8,192 with a GPU, else 256.",
)
@click.option(
    "--programs",
    type=NumberList(1, 1024),
    default=(),
    help="Numbers of Triton programs to try; default: 4 to 64. GPU only.",
)
@click.option(
    "--record-bytes",
    type=NumberList(8, 65_536, multiple_of=4),
    default=(),
    help="Record sizes to try, multiples of 4; default: 160 to 1,152.",
)
@shared.seconds
@shared.threads
@shared.json
def links(**chosen: Any) -> None:
    """Time record transfers by kernels between host memory and the GPU, against the copy engines.

    Records of 160 to 1,152 bytes, ascending and in random order, by 4 to 64 programs, unless given; each direction
    alone, and both at once. On a CPU it copies from host to host.
    """
    shared.measure(("links",), **chosen)


@click.command(
    short_help="Time saves and loads against dd and cat.",
    epilog="""\b
Examples:
  engram bench checkpoint
  engram bench checkpoint --folder /mnt/scratch --table-mib 8192 --json
""",
)
@click.option(
    "--folder", type=click.Path(file_okay=False), default="runs", show_default=True, help="Where to write and read."
)
@click.option(
    "--table-mib", type=click.IntRange(min=1), default=2048, show_default=True, help="Size of the table, in memory."
)
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Times that all is measured.")
@click.option("--lookups", type=click.IntRange(min=1), default=65_536, show_default=True, help="Lookups per step.")
@click.option(
    "--compute-ms",
    type=Finite(min=0),
    default=100.0,
    show_default=True,
    help="Computation of the model per step, on the CPU.",
)
@click.option(
    "--threads", type=click.IntRange(min=1), default=1, show_default=True, help="PyTorch threads of the training loop."
)
@shared.json
def checkpoint(lookups: int, folder: str, **chosen: Any) -> None:
    """Time saves and loads of a table against dd and cat on the same disk, and steps while saves are written.

    One rank, without a GPU; needs three times the table's size on the disk, and once in memory.
    """
    from launch.bench.workload import Workload

    Path(folder).mkdir(parents=True, exist_ok=True)
    # Made here, not by the rank: whatever ends that, this removes it.
    with tempfile.TemporaryDirectory(prefix=".engram-bench-", dir=folder) as empty:
        shared.measure(("checkpoint",), device="cpu", workload=Workload(lookups), folder=empty, **chosen)


@click.command(
    short_help="Time the preparation of text, and the loader.",
    epilog="""\b
Examples:
  engram bench data
  engram bench data --run runs/tiny --rounds 5 --json
""",
)
@click.option(
    "--folder", type=click.Path(file_okay=False), default="runs", show_default=True, help="Where to write and read."
)
@click.option("--text-mb", type=click.IntRange(1, 10_000), default=32, show_default=True, help="Text to prepare.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Times that all is measured.")
@click.option("--run", metavar="RUN", help="Also time the loader of this run beside the steps that it has recorded.")
@shared.json
def data(folder: str, run: str | None, **chosen: Any) -> None:
    """Time the preparation of text against Hugging Face's tokenizers alone, on one core, and the loader.

    Also tells the memory that one large file takes, and one large document, and what of it grows with the size.
    """
    from train.run_folder import find_run

    if run is not None:
        find_run(run)
    Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".engram-bench-", dir=folder) as empty:
        # As `engram data prepare` runs, and whoever uses tokenizers: no rank's settings of the C library.
        shared.measure(("data",), device="cpu", threads=1, plain_allocator=True, folder=empty, run=run, **chosen)
