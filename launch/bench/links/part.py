"""Part `links`: how fast records travel between host memory and the device, beside its copy engines."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from kernels.records import PROGRAMS, fetch_records, write_records
from launch.bench.clock import Clock, Run, clock_of
from launch.bench.deadline import Deadline
from launch.bench.devices import open_device
from launch.bench.host_link import HostLink
from launch.bench.links.both_directions import both_at_once
from launch.bench.measure import Spread
from launch.bench.options import BenchOptions
from launch.bench.report import Cell, Measure, Section
from train.progress import Progress

_RECORD_BYTES = (160, 256, 512, 1024, 1152)
_PROGRAMS = (4, 8, 16, 32, 64)
_HOST_MIB = {"cuda": 8192, "cpu": 256}
_COPIED = {"cuda": 128 << 20, "cpu": 16 << 20}  # bytes of a copy
_SECONDS = {"cuda": 0.03, "cpu": 0.05}
_IN, _OUT = "host to device", "device to host"
_OF_ENGINE, _SMALL_ROWS, _LOST = 0.85, 150.0, 0.15


@dataclass(frozen=True)
class _Way:
    """A way to move many bytes.

    Attributes:
        what: the name of what carries them.
        direction: from where to where.
        record_bytes: of a record; None for one piece.
        order: of the records in host memory.
        programs: of the kernel; None where there is none.
        rows: moved at a time.
        nbytes: moved at a time.
        run: does it.
    """

    what: str
    direction: str
    record_bytes: int | None
    order: str
    programs: int | None
    rows: int | None
    nbytes: int
    run: Run


def measure_links(options: BenchOptions, progress: Progress) -> Section:
    """Times copies of one piece, then of records of every size, then of both directions at once.

    Raises:
        UserError: there is no such device.
        Unavailable: host memory does not suffice, or the system pins none for the GPU.
    """
    deadline, device = Deadline(options.seconds), open_device(options.device)
    clock = clock_of(device, _SECONDS[device.type])
    host_bytes = (options.memory_mib or _HOST_MIB[device.type]) << 20
    copied = min(_COPIED[device.type], host_bytes // 4)
    link = HostLink(device, host_bytes, 2 * copied)
    try:
        ways = list(_ways(link, copied, options.record_bytes or _RECORD_BYTES, options.programs or _PROGRAMS))
        progress.expect(len(ways))
        rows, rates = [], {}
        for way in ways:
            rates[way] = _rate(way, clock) if deadline.allows(0) else None
            rows.append(_row(way, rates[way], _engine_rate(rates, way.direction)))
            progress.advance()
        both = both_at_once(link, copied, deadline) if device.type == "cuda" else {}
        del ways
    finally:
        link.close()
    rows += [_both_row(what, found.record_bytes, found.rate) for what, found in both.items()]
    measures = _measures(rates, {what: found.lost for what, found in both.items()}) if device.type == "cuda" else []
    title = f"Links of {torch.cuda.get_device_name(device)}" if device.type == "cuda" else "Copies from host to host"
    return Section(title, rows, measures, _notes(device, host_bytes, copied, rates))


def _ways(
    link: HostLink, copied: int, record_bytes: tuple[int, ...], programs_in_turn: tuple[int, ...]
) -> Iterator[_Way]:
    on_gpu = link.device.type == "cuda"
    engine = "copy engine" if on_gpu else "copy_ of one piece"
    host_N, device_N = link.host_N[: copied // 4], link.device_N[: copied // 4]
    yield _Way(engine, _IN, None, "", None, None, copied, partial(device_N.copy_, host_N, non_blocking=True))
    yield _Way(engine, _OUT, None, "", None, None, copied, partial(host_N.copy_, device_N, non_blocking=True))
    # The default number of programs comes first: a run that is cut short has its figures.
    counts = sorted(programs_in_turn, key=lambda count: count != PROGRAMS) if on_gpu else [None]
    for programs in counts:
        for nbytes in record_bytes:
            for ordered in (True, False):
                yield from _record_ways(link, nbytes, copied // nbytes, ordered, programs)


def _record_ways(link: HostLink, nbytes: int, count: int, ordered: bool, programs: int | None) -> Iterator[_Way]:
    words = nbytes // 4
    host_RW, window_CW = link.host_records(words), link.device_records(words)
    count = min(count, len(host_RW), len(window_CW))
    rows_U, slots_U = link.draw_rows(count, words, ordered=ordered), link.draw_slots(count)
    order = "ascending" if ordered else "random"
    what = "kernel" if link.device.type == "cuda" else "record by record"
    more: dict[str, Any] = {"programs": programs} if programs else {}
    fetch = partial(fetch_records, host_RW, rows_U, window_CW, slots_U, **more)
    write = partial(write_records, window_CW, slots_U, host_RW, rows_U, **more)
    for name, direction, run in (("fetch", _IN, fetch), ("write back", _OUT, write)):
        yield _Way(f"{what}: {name}", direction, nbytes, order, programs, count, count * nbytes, run)


def _rate(way: _Way, clock: Clock) -> Spread:
    """GB/s."""
    taken_ms = clock.time(way.run)
    return Spread(*(way.nbytes / 1e6 / ms for ms in (taken_ms.median, taken_ms.p90, taken_ms.p10)))


def _engine_rate(rates: dict[_Way, Spread | None], direction: str) -> float | None:
    for way, rate in rates.items():
        if way.record_bytes is None and way.direction == direction and rate:
            return rate.median
    return None


def _row(way: _Way, rate: Spread | None, engine: float | None) -> dict[str, Cell]:
    return {
        "what": way.what,
        "direction": way.direction,
        "bytes_a_record": way.record_bytes,
        "order": way.order,
        "programs": way.programs,
        "GB_per_s": rate,
        "million_records_per_s": rate.median * 1e3 / way.record_bytes if rate and way.record_bytes else None,
        "of_one_piece": rate.median / engine if rate and engine else None,
        "status": "measured" if rate else "left out: no time was left",
    }


def _both_row(what: str, nbytes: int | None, rate: Spread | None) -> dict[str, Cell]:
    return {
        "what": what,
        "direction": "both at once, their sum",
        "bytes_a_record": nbytes,
        "order": "ascending" if nbytes else "",
        "programs": PROGRAMS if nbytes else None,
        "GB_per_s": rate,
        "million_records_per_s": rate.median * 1e3 / nbytes if rate and nbytes else None,
        "of_one_piece": None,
        "status": "measured" if rate else "left out: no time was left",
    }


def _measures(rates: dict[_Way, Spread | None], lost: dict[str, float | None]) -> list[Measure]:
    found = []
    engine = _engine_rate(rates, _IN)
    for nbytes in sorted({way.record_bytes for way in rates if way.record_bytes}):
        best = max(
            (
                rate.median
                for way, rate in rates.items()
                if rate and way.record_bytes == nbytes and way.direction == _IN
            ),
            default=None,
        )
        if best is None or engine is None:
            continue
        if nbytes >= 960:
            name = f"fetch of {nbytes:,}-byte records, share of the copy engine's rate"
            found.append(Measure(name, best / engine, _OF_ENGINE, at_least=True))
        if nbytes == 160:
            name = "fetch of 160-byte records, million records/s"
            found.append(Measure(name, best * 1e3 / nbytes, _SMALL_ROWS, at_least=True))
    for what, share in lost.items():
        if share is not None:
            found.append(Measure(f"{what}, both directions at once: share of their sum that is lost", share, _LOST))
    return found


def _notes(device: torch.device, host_bytes: int, copied: int, rates: dict[_Way, Spread | None]) -> list[str]:
    engines = ", ".join(f"{way} {_engine_rate(rates, way) or 0:,.1f} GB/s" for way in (_IN, _OUT))
    notes = [
        f"{copied / 2**20:,.0f} MiB a copy, from and to {host_bytes / 2**20:,.0f} MiB of host memory; records lie "
        "spread over all of it, slots in random order",
        "a record counts once: it is read on one side and written on the other; median (10th to 90th percentile)",
        f"limit, measured in this run: one piece, {engines}",
    ]
    if device.type == "cuda":
        return [
            *notes,
            "kernel: programs that reach into pinned memory over the bus; each takes up a part of a processor (SM)",
        ]
    return [
        *notes,
        f"no GPU: host to host on {torch.get_num_threads()} thread(s), by the functions that run there; there is no "
        "bus, so both directions at once say nothing and are not measured",
    ]
