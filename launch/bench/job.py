"""Part `job`: a whole training job with its tables in host memory, beside the same job with them on the device."""

from launch.bench.measure import Spread
from launch.bench.options import BenchOptions
from launch.bench.progress import Progress
from launch.bench.report import Cell, Measure, Section
from launch.bench.train_run import train_run

_LIMIT = 1.03
_MODES = ("window", "resident")


def measure_job(options: BenchOptions, progress: Progress) -> Section:
    """Trains the job of `options.job` in both modes, `options.runs` times each, in turns.

    Raises:
        UserError: the job cannot be trained; in the words of `engram train`.
    """
    progress.expect(options.runs * len(_MODES) * options.total_steps)
    step_ms: dict[str, list[float]] = {mode: [] for mode in _MODES}
    ratios = []
    for run in range(options.runs):
        medians = {}
        for mode in _MODES if run % 2 == 0 else _MODES[::-1]:
            taken = _train(options, mode)[options.warmup :]
            step_ms[mode] += taken
            medians[mode] = Spread.of(taken).median
            progress.advance(options.total_steps)
        ratios.append(medians["window"] / medians["resident"])
    base = Spread.of(step_ms["resident"]).median
    rows: list[dict[str, Cell]] = [
        {
            "offload.mode": mode,
            "step_ms": Spread.of(taken),
            "times_resident": Spread.of(taken).median / base if mode == "resident" else Spread.of(ratios),
        }
        for mode, taken in step_ms.items()
    ]
    return Section(
        f"{options.job}: a training step by where the tables are",
        rows,
        [Measure("step with offload, times resident", Spread.of(ratios).median, _LIMIT)],
        [f"{options.runs} run(s) of {options.total_steps} steps in each mode, in turns; ratios compare run by run"],
    )


def _train(options: BenchOptions, mode: str) -> list[float]:
    """Milliseconds of every step of a run."""
    records = train_run(options.job, options.total_steps, device=options.device, offload__mode=mode)
    return [record["step_ms"] for record in records]
