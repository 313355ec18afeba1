"""The first failure of a job, out of the reports that its ranks left in a shared folder."""

import sys
from pathlib import Path

from launch.local.failures import RankReport


def first_failure(reports: Path) -> str | None:
    """What the rank that failed first told, and which it was; None if no rank left a report."""
    told = [(path.name, RankReport.read(path)) for path in reports.glob("rank*") if not path.suffix]
    found = [(name, report) for name, report in told if report and report.kind != "interrupted"]
    if not found:
        return None
    name, report = min(found, key=lambda each: (each[1].kind == "peer", each[1].time))
    rank = name.replace("rank", "rank ")
    if report.kind == "user":
        return report.text
    if report.kind == "peer":  # all of them: the one that was lost could not tell
        return f"{rank} lost another rank, whose host or link failed: {report.text.splitlines()[-1]}"
    return f"{rank} failed\n{report.text}"


def main() -> None:
    """Prints the first failure that the ranks left in the folder given."""
    told = first_failure(Path(sys.argv[1]))
    print(f"Error: {told}" if told else f"no rank left a report in {sys.argv[1]}: see the logs", file=sys.stderr)


if __name__ == "__main__":
    main()
