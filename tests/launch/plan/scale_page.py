"""Makes the tables and plots of docs/scale.md anew: `python -m tests.launch.plan.scale_page`. Some minutes."""

import sys
from collections.abc import Sequence
from pathlib import Path

from launch.plan.hardware import read_catalogue
from launch.plan.report.scale import COLUMNS, draw
from launch.plan.scale import Machines, Point, scaled
from train.config.file import load
from train.config.job import JobConfig

DOCS = Path(__file__).parents[3] / "docs"
JOBS = ("engram-27b", "engram-40b", "deepseek-v41-memory")
BATCH = ("data.sequence_length=1024", "train.global_batch_size=4096", "train.micro_batch_size=4")
WORLDS, GROWING, ZIPF = (8, 64, 512, 4096), 8, 1.2


def table(points: Sequence[Point]) -> str:
    """Of Markdown."""
    rows = [["batch", *COLUMNS], ["---"] * (1 + len(COLUMNS))]
    rows += [[point.batch, *(of(point) for of in COLUMNS.values())] for point in points]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def put(page: str, name: str, text: str) -> str:
    """The page with `text` between the marks of that name."""
    start, end = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
    before, _, rest = page.partition(start)
    return before + start + text + end + rest.partition(end)[2]


def main(names: Sequence[str]) -> None:
    catalogue = read_catalogue()
    machines = Machines(catalogue.gpu("h100"), catalogue.network("ib400"), 8)
    for name in names or JOBS:
        job = load(DOCS.parent / f"configs/paper/{name}.yaml", BATCH, JobConfig)
        points = list(scaled(job, machines, ZIPF, GROWING).points(WORLDS, lambda text: print(text, flush=True)))
        (DOCS / "plots").mkdir(exist_ok=True)
        draw(points, f"{name}; {points[0].stream}", DOCS / f"plots/scale-{name}.png")
        page = (DOCS / "scale.md").read_text()
        (DOCS / "scale.md").write_text(put(page, name, table(points)))


if __name__ == "__main__":
    main(sys.argv[1:])
