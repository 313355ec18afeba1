"""The first failure of a job, from the reports that its ranks left in a shared folder."""

import sys
from pathlib import Path

from launch.local.failures import RankReport


def first_failure(reports: Path) -> str | None:
    """What the rank that failed first reported, and which it was; None if no rank left a report."""
    found = [(name, report) for name, report in _reports(reports) if report.kind != "interrupted"]
    if not found:
        return None
    name, report = min(found, key=lambda each: (each[1].kind == "peer", each[1].time))
    rank = name.replace("rank", "rank ")
    if report.kind == "user":
        return report.text
    if report.kind == "peer":  # all of them: the one that was lost could not report
        return f"{rank} lost another rank, whose host or link failed: {report.text.splitlines()[-1]}"
    return f"{rank} failed\n{report.text}"


def all_saved(reports: Path) -> bool:
    """Whether a signal ended the ranks, after they had saved their work, if the run saves at all."""
    return {report.kind for _, report in _reports(reports)} == {"interrupted"}


def _reports(folder: Path) -> list[tuple[str, RankReport]]:
    read = [(path.name, RankReport.read(path)) for path in folder.glob("rank*") if not path.suffix]
    return [(name, report) for name, report in read if report]


def main() -> None:
    """Prints the first failure that the ranks left in the given folder."""
    told = first_failure(Path(sys.argv[1]))
    print(f"Error: {told}" if told else f"no rank left a report in {sys.argv[1]}: see the logs", file=sys.stderr)


if __name__ == "__main__":
    main()
