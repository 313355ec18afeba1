"""What a check finds, and how findings of many hosts are reported."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["ok", "warning", "missing"]
_WIDTH = 14


@dataclass(frozen=True)
class Check:
    """One finding: `ok`, a `warning` with which training works but may be slow, or `missing`, without which it fails.

    `remedy` is what to do, if anything is to be done.
    """

    name: str
    status: Status
    found: str
    remedy: str = ""


def bound(name: str, status: Status, fits: bool, found: str, remedy: str) -> Check:
    """A check that is ok if it `fits`, else has that status and the remedy."""
    return Check(name, "ok", found) if fits else Check(name, status, found, remedy)


def lines(by_host: Mapping[str, Sequence[Check]]) -> list[str]:
    """A line for each finding; hosts that found the same share one, and are named where not all of them did."""
    hosts: dict[Check, list[str]] = {}
    for host, checks in by_host.items():
        for check in checks:
            hosts.setdefault(check, []).append(host)
    told = []
    for check, found_by in hosts.items():
        where = f" [{', '.join(found_by)}]" if len(found_by) < len(by_host) else ""
        remedy = f": {check.remedy}" if check.remedy else ""
        told.append(f"{check.status:<8} {check.name:<{_WIDTH}} {check.found}{remedy}{where}")
    return told


def to_json(by_host: Mapping[str, Sequence[Check]]) -> dict[str, Any]:
    """The findings as a JSON object."""
    return {
        "ok": not is_missing(by_host),
        "hosts": {host: [asdict(check) for check in checks] for host, checks in by_host.items()},
    }


def is_missing(by_host: Mapping[str, Sequence[Check]]) -> bool:
    """Whether any host lacks what training needs."""
    return any(check.status == "missing" for checks in by_host.values() for check in checks)
