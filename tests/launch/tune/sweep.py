"""What `engram tune` recommends against a sweep of everything: `python -m tests.launch.tune.sweep [--write]`.

A small job behind emulated links of five speeds, on one and two ranks. For each case it runs `engram tune`, then the
same with `--exhaustive`: every look-ahead with every window, equally often. The recommendation's step, by the sweep,
may be 2 % longer than that of the sweep's best point, or twice the spread of one point repeated in it. An hour at most;
results are kept in a file, so that it can be done in pieces (`--links 50 --ranks 1`). `--write` puts the table of all
that is in the file into docs/tune.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from launch.tune.points import Point
from launch.tune.turns import Turn
from tests.command_line import JOB
from tests.launch.plan.scale_page import DOCS, put

LINKS = (50, 100, 200, 400, 800)
"""MB/s."""
RANKS = (1, 2)
ALLOWED = 0.02
MODULES = ("argparse", "ast", "bisect", "configparser", "csv", "dataclasses", "difflib", "functools", "gzip", "heapq")
SECTIONS: dict[str, Any] = {
    "model": JOB["model"]
    | {"moe": None, "engram": {"layers": [0, 1], "heads": 4, "rows_per_head": 20000, "row_dim": 32}},
    "train": {"steps": 100, "global_batch_size": 32, "micro_batch_size": 16},
    "data": {"sequence_length": 64, "validation_fraction": 0.2},
    "offload": {"window_rows": 60000},
}


@dataclass(frozen=True)
class Case:
    """What was recommended, and what the sweep says of it.

    Attributes:
        link: MB/s of the emulated link, each way.
        ranks: of the job.
        recommended, best: look-ahead and window; `best` by the sweep.
        recommended_ms, best_ms: of a step there, by the sweep.
        off: what the recommendation takes longer, as a share; compared round by round.
        spread: standard deviation of one point's step over the rounds, as a share; the median of all points.
        turns: of `engram tune`, and of the sweep.
        finished: whether both ended before their time was over.
    """

    link: int
    ranks: int
    recommended: tuple[int, int]
    best: tuple[int, int]
    recommended_ms: float
    best_ms: float
    off: float
    spread: float
    turns: tuple[int, int]
    finished: bool

    @property
    def limit(self) -> float:
        """What it may be off."""
        return max(ALLOWED, 2 * self.spread)

    @property
    def met(self) -> bool:
        """Whether it keeps to it."""
        return self.off <= self.limit

    def row(self) -> str:
        """A line of the table."""
        cells = (
            f"{self.link} MB/s",
            str(self.ranks),
            f"depth {self.recommended[0]}, {self.recommended[1]:,}",
            f"{self.recommended_ms:.1f} ms",
            f"depth {self.best[0]}, {self.best[1]:,}",
            f"{self.best_ms:.1f} ms",
            f"{self.off:+.1%}",
            f"{self.limit:.1%}" + ("" if self.met else " **not met**"),
            f"{self.turns[0]} of {self.turns[1]}" + ("" if self.finished else ", time over"),
        )
        return f"| {' | '.join(cells)} |"


HEAD = (
    "| link | ranks | recommended | its step | best of the sweep | its step | off | allowed | turns |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def judge(link: int, ranks: int, tuned: dict[str, Any], swept: dict[str, Any]) -> Case:
    """Compares, from the two answers in JSON."""
    turns = [turn_of(each) for each in swept["turns"]]
    compared = compared_by_rounds(turns)
    # Planner threads are no part of the sweep.
    wanted = Point(**tuned["recommended"] | {"planner_threads": tuned["configured"]["planner_threads"]})
    best = min(compared, key=lambda point: compared[point])
    ms = {point: statistics.median(t.mean_ms for t in turns if t.point == point) for point in (wanted, best)}
    return Case(
        link,
        ranks,
        (wanted.depth, wanted.window_rows),
        (best.depth, best.window_rows),
        ms[wanted],
        ms[best],
        compared[wanted] / compared[best] - 1,
        spread_of(turns),
        (len(tuned["turns"]), len(turns)),
        tuned["finished"] and swept["finished"],
    )


def turn_of(saved: dict[str, Any]) -> Turn:
    """A turn from JSON."""
    return Turn(**saved | {"point": Point(**saved["point"]), "step_ms": tuple(saved["step_ms"])})


def spread_of(turns: Sequence[Turn]) -> float:
    """See `Case.spread`; rounds are compared by the mean of all their points."""
    each = list(relative(turns).values())
    enough = len(each[0]) > 1
    return statistics.median(statistics.stdev(its) / statistics.fmean(its) for its in each) if enough else 0.0


def compared_by_rounds(turns: Sequence[Turn]) -> dict[Point, float]:
    """Each point's plain step time as a share of its round's mean: the median over the rounds."""
    return {point: statistics.median(its) for point, its in relative(turns).items()}


def relative(turns: Sequence[Turn]) -> dict[Point, list[float]]:
    """By point, its step in each whole round as a share of the round's mean."""
    rounds: dict[int, dict[Point, float]] = {}
    for turn in turns:
        rounds.setdefault(turn.round, {})[turn.point] = turn.mean_ms
    whole = [its for its in rounds.values() if len(its) == len(rounds[0])]
    return {point: [its[point] / statistics.fmean(its.values()) for its in whole] for point in rounds[0]}


def run_case(folder: Path, link: int, ranks: int, minutes: tuple[float, float], *overrides: str) -> Case:
    """Tunes and sweeps."""
    job = job_file(folder)
    emulated = f"offload.emulate_link={{bytes_per_second: {link}.0e+6}}"
    name = f"{link}-{ranks}"
    answers = []
    for kind, more in (("tuned", []), ("swept", ["--exhaustive"])):
        command = ["tune", str(job), emulated, *overrides, "--nproc", str(ranks), "--out", str(folder / name / kind)]
        limit = minutes[bool(more)]
        answers.append(engram(*command, *more, "--minutes", f"{limit:g}", "--anew", "--json"))
    return judge(link, ranks, *(json.loads(answer) for answer in answers))


def engram(*arguments: str) -> str:
    """What a command prints on standard output."""
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "launch", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout


def job_file(folder: Path) -> Path:
    """The job, and its text, made once."""
    data, job = folder / "prepared", folder / "job.yaml"
    if not data.exists():
        stdlib = Path(sysconfig.get_path("stdlib"))
        sources = [str(stdlib / f"{name}.py") for name in MODULES]
        engram("data", "prepare", *sources, "--out", str(data), "--train-bpe", "300")
    sections = JOB | SECTIONS | {"run": {"name": "swept", "dir": str(folder / "runs")}}
    sections["data"] = sections["data"] | {"path": str(data)}
    job.write_text(yaml.safe_dump(sections))
    return job


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--links", type=int, nargs="*", default=LINKS, help="MB/s")
    parser.add_argument("--ranks", type=int, nargs="*", default=RANKS)
    parser.add_argument("--minutes", type=float, nargs=2, default=(1.2, 4.0), help="of tuning, and of the sweep")
    parser.add_argument("--folder", type=Path, default=Path("runs/sweep"), help="for everything that it keeps")
    parser.add_argument("--write", action="store_true", help="put the table into docs/tune.md")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    kept = asked.folder / "cases.json"
    known = json.loads(kept.read_text()) if kept.exists() else {}
    for ranks in asked.ranks:
        for link in asked.links:
            case = run_case(asked.folder.resolve(), link, ranks, tuple(asked.minutes))
            known[f"{link}-{ranks}"] = asdict(case)
            kept.write_text(json.dumps(known, indent=1))
            print(case.row(), flush=True)
    cases = sorted((Case(**saved) for saved in known.values()), key=lambda case: (case.ranks, case.link))
    if asked.write:
        page = DOCS / "tune.md"
        page.write_text(put(page.read_text(), "sweep", "\n".join([HEAD, *(case.row() for case in cases)])))
    sys.exit(0 if all(case.met for case in cases) else 1)


if __name__ == "__main__":
    main()
