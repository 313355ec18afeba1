"""A pytest plugin that tells of each failure when it happens: a run that is cut short has told of those before."""

import sys

import pytest

_LINES, _COLUMNS = 12, 200


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Prints a failed test's name and the end of its account."""
    if report.failed:
        account = str(report.longrepr).strip().splitlines()[-_LINES:]
        print(f"\nFAILED {report.nodeid} ({report.duration:.1f} s)", *account, sep="\n  ", file=sys.stderr, flush=True)
    elif report.when == "call" and report.duration > 20:
        print(f"\nslow: {report.nodeid} ({report.duration:.1f} s)", file=sys.stderr, flush=True)
