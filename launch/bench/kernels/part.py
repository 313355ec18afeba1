"""Part `kernels`: each kernel beside its PyTorch reference and beside what the hardware allows."""

from collections.abc import Callable, Iterator

import torch

from launch.bench.clock import Clock, clock_of, memory_rate
from launch.bench.deadline import Deadline
from launch.bench.devices import open_device
from launch.bench.host_link import HostLink
from launch.bench.kernels.cases import (
    Case,
    Sizes,
    gate_cases,
    gather_cases,
    hash_cases,
    initial_row_cases,
    record_cases,
)
from launch.bench.kernels.optimizer_cases import optimizer_cases
from launch.bench.measure import Spread
from launch.bench.options import BenchOptions
from launch.bench.report import Cell, Measure, Section
from offload.errors import Unavailable
from train.progress import Progress

_FAMILIES: dict[str, Callable[[Sizes], Iterator[Case]]] = {
    "hash": hash_cases,
    "gather": gather_cases,
    "update": optimizer_cases,
    "records": record_cases,
    "gate": gate_cases,
    "initial rows": initial_row_cases,
}
_COLUMNS = ("sizes", "ours_us", "reference_us", "times_faster", "moved_MB", "GB_per_s", "limit", "of_the_limit")
_TOKENS, _HIDDEN = {"cuda": 16_384, "cpu": 1_024}, {"cuda": 2560, "cpu": 512}
_RATE_BYTES = {"cuda": 1 << 30, "cpu": 128 << 20}
_HOST_BYTES = {"cuda": 4 << 30, "cpu": 128 << 20}
_SECONDS = {"cuda": 0.05, "cpu": 0.2}
_OF_MEMORY, _HASH_US, _HASH_TIMES = 0.8, 10.0, 25.0
_RATE = 1e-9


def measure_kernels(options: BenchOptions, progress: Progress) -> Section:
    """Times all kernels. One that cannot run, or for which there is no time, is named with the reason.

    Raises:
        UserError: there is no such device.
    """
    deadline, device = Deadline(options.seconds), open_device(options.device)
    tokens = options.tokens or _TOKENS[device.type]
    share = min(1.0, tokens / _TOKENS[device.type])
    clock = clock_of(device, share * _SECONDS[device.type])
    host_bytes = max(1 << 22, int(share * _HOST_BYTES[device.type]))
    sizes = Sizes(device, tokens, _HIDDEN[device.type], host_bytes)
    progress.expect(len(_FAMILIES))
    rates = {"memory": memory_rate(device, clock, max(1 << 22, int(share * _RATE_BYTES[device.type])))}
    if device.type == "cuda":
        rates |= _link_rates(device, clock)
    rows: list[dict[str, Cell]] = []
    for family, cases in _FAMILIES.items():
        rows += _family_rows(family, cases, sizes, clock, rates, deadline)
        progress.advance()
    return Section(f"Kernels on {_device_name(device)}", rows, _measures(rows, device), _notes(device, rates, tokens))


def _link_rates(device: torch.device, clock: Clock) -> dict[str, float]:
    try:
        link = HostLink(device, 1 << 28, 1 << 28)
    except Unavailable:  # the kernels that need it fail for the same reason, and say so
        return {}
    try:
        return {
            "link to the device": link.copy_rate(clock, to_device=True),
            "link to the host": link.copy_rate(clock, to_device=False),
        }
    finally:
        link.close()


def _family_rows(
    family: str,
    cases: Callable[[Sizes], Iterator[Case]],
    sizes: Sizes,
    clock: Clock,
    rates: dict[str, float],
    deadline: Deadline,
) -> Iterator[dict[str, Cell]]:
    if not deadline.allows(0):
        yield _absent(family, "left out: no time was left")
        return
    try:
        for case in cases(sizes):
            if not deadline.allows(0):
                yield _absent(case.kernel, "left out: no time was left")
                return
            yield _row(case, clock, rates)
    # Whatever keeps one kernel from running here, the others' figures are wanted.
    except Exception as error:
        yield _absent(family, f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}")


def _row(case: Case, clock: Clock, rates: dict[str, float]) -> dict[str, Cell]:
    ours = clock.time(case.ours, case.prepare)
    reference = clock.time(case.reference, case.prepare) if case.reference else None
    rate = case.nbytes / (1e-3 * ours.median)
    return {
        "kernel": case.kernel,
        "sizes": case.sizes,
        "ours_us": _micro(ours),
        "reference_us": _micro(reference) if reference else None,
        "times_faster": reference.median / ours.median if reference else None,
        "moved_MB": case.nbytes / 1e6,
        "GB_per_s": _RATE * rate,
        "limit": case.limit,
        "of_the_limit": rate / rates[case.limit],
        "status": "measured",
    }


def _absent(kernel: str, status: str) -> dict[str, Cell]:
    return {"kernel": kernel, **dict.fromkeys(_COLUMNS), "status": status}


def _micro(spread: Spread) -> Spread:
    return Spread(1e3 * spread.median, 1e3 * spread.p10, 1e3 * spread.p90)


def _measures(rows: list[dict[str, Cell]], device: torch.device) -> list[Measure]:
    if device.type != "cuda":
        return []
    found = []
    for row in rows:
        kernel, share, times, ours = row["kernel"], row["of_the_limit"], row["times_faster"], row["ours_us"]
        if not isinstance(ours, Spread) or not isinstance(share, float):
            continue
        if kernel == "hash" and isinstance(times, float):
            found.append(Measure("hash, microseconds", ours.median, _HASH_US))
            found.append(Measure("hash, times as fast as in PyTorch", times, _HASH_TIMES, at_least=True))
        elif str(kernel).startswith(("gather", "update")) and "missed" not in str(row["sizes"]):
            name = f"{kernel}, share of the memory's rate ({row['sizes']})"
            found.append(Measure(name, share, _OF_MEMORY, at_least=True))
    return found


def _notes(device: torch.device, rates: dict[str, float], tokens: int) -> list[str]:
    measured = "; ".join(f"{name} {_RATE * rate:,.1f} GB/s" for name, rate in rates.items())
    notes = [
        f"limits, measured in this run: {measured} (memory: a copy, reads and writes counted)",
        f"a step of {tokens:,} tokens; median (10th to 90th percentile), caches flushed before each run",
        "moved: bytes that any implementation must read and write; of the limit: their rate over the limit's",
    ]
    if device.type == "cuda":
        return [*notes, "timed by CUDA events around work that is queued whole: the host's own time is not counted"]
    return [
        *notes,
        "on a CPU: the public functions as they run there, at smaller sizes; the Triton kernels need a GPU. No "
        "reference: what runs here is the reference itself",
    ]


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"the CPU, {torch.get_num_threads()} thread(s)"
