"""Part `train`: a training step with its rows coming from host memory, by look-ahead, beside all rows resident."""

import time
from dataclasses import dataclass, field
from typing import NamedTuple

from launch.bench.deadline import Deadline
from launch.bench.measure import Spread
from launch.bench.options import BenchOptions
from launch.bench.peak import peak_of
from launch.bench.progress import Progress
from launch.bench.report import Cell, Measure, Section
from launch.bench.train_run import train_run

_LIMIT = {"cuda": 1.01, "cpu": 1.03}
_LEFT_OUT = "left out: no time was left"


class _Setting(NamedTuple):
    mode: str
    depth: int | None


_RESIDENT = _Setting("resident", None)
# What matters most comes first: a benchmark that is cut short has it.
_SETTINGS = (_RESIDENT, *(_Setting("window", depth) for depth in (2, 1, 4, 0)))


@dataclass
class _Runs:
    """What the runs of a setting came to: times of all timed steps, and one entry a run."""

    step_ms: list[float] = field(default_factory=list)
    stall_ms: list[float] = field(default_factory=list)
    medians: dict[int, float] = field(default_factory=dict)
    losses: list[list[float]] = field(default_factory=list)


@dataclass(frozen=True)
class _Scale:
    """What a step computes, and what it could compute in a second."""

    step_tokens: int
    step_flops: float
    dtype: str
    devices: int
    peak: float


def measure_training(options: BenchOptions, peak: Section, progress: Progress) -> Section:
    """Trains the job of `options.job` in every setting, `options.runs` times each, in turns.

    Args:
        options: how to measure; `seconds` counts from now.
        peak: what part `peak` found.
        progress: to report to.

    Raises:
        UserError: the job cannot be trained; in the words of `engram train`.
    """
    deadline, scale = Deadline(options.seconds), _scale(options, peak)
    progress.expect(options.runs * len(_SETTINGS) * options.total_steps)
    found = {setting: _Runs() for setting in _SETTINGS}
    longest_s = 0.0
    for run in range(options.runs):
        for setting in _SETTINGS if run % 2 == 0 else _SETTINGS[::-1]:
            if (run or setting is not _RESIDENT) and not deadline.allows(longest_s):
                continue
            started = time.monotonic()
            _train(options, setting, run, found[setting])
            longest_s = max(longest_s, time.monotonic() - started)
            progress.advance(options.total_steps)
    rows = [_row(setting, runs, found[_RESIDENT], scale) for setting, runs in found.items()]
    return Section(
        f"{options.job}: a training step by where the tables are",
        rows,
        _measures(found, options),
        _notes(options, scale),
    )


def _train(options: BenchOptions, setting: _Setting, run: int, runs: _Runs) -> None:
    depth = {} if setting.depth is None else {"offload__depth": setting.depth}
    records = train_run(options.job, options.total_steps, device=options.device, offload__mode=setting.mode, **depth)
    timed = records[options.warmup :]
    runs.step_ms += [record["step_ms"] for record in timed]
    runs.stall_ms += [record["offload.stall_ms"] for record in timed if "offload.stall_ms" in record]
    runs.medians[run] = Spread.of([record["step_ms"] for record in timed]).median
    runs.losses.append([record["loss"] for record in records])


def _scale(options: BenchOptions, peak: Section) -> _Scale:
    from launch.rank_environment import rank_count, visible_gpus
    from model.census import take_census
    from model.flops import flops_per_token
    from train.config import JobConfig
    from train.config_file import load

    job = load(options.job, [], JobConfig)
    length = job.data.sequence_length
    tokens = job.train.global_batch_size * length
    flops = flops_per_token(job.model, take_census(job.model), length).total
    # Ranks on a CPU share the cores that the peak was measured with.
    devices = rank_count(job.run.nproc, visible_gpus()) if options.device == "cuda" else 1
    return _Scale(tokens, tokens * flops, job.train.dtype, devices, devices * peak_of(peak, job.train.dtype))


def _ratios(runs: _Runs, base: _Runs) -> list[float]:
    return [median / base.medians[run] for run, median in runs.medians.items() if run in base.medians]


def _row(setting: _Setting, runs: _Runs, base: _Runs, scale: _Scale) -> dict[str, Cell]:
    step = Spread.of(runs.step_ms) if runs.step_ms else None
    ratios = _ratios(runs, base)
    return {
        "offload.mode": setting.mode,
        "depth": setting.depth,
        "step_ms": step,
        "times_resident": Spread.of(ratios) if ratios else None,
        "stall_ms": Spread.of(runs.stall_ms).median if runs.stall_ms else None,
        "tokens_per_s": scale.step_tokens / (1e-3 * step.median) if step else None,
        "TFLOP_per_s": scale.step_flops / 1e12 / (1e-3 * step.median) if step else None,
        "model_FLOPs_utilisation_percent": 100 * scale.step_flops / (1e-3 * step.median) / scale.peak if step else None,
        "losses": _compared(runs, base),
        "status": "measured" if step else _LEFT_OUT,
    }


def _compared(runs: _Runs, base: _Runs) -> str | None:
    if not runs.losses or not base.losses:
        return None
    return "the same bits" if all(losses == base.losses[0] for losses in runs.losses) else "DIFFERENT"


def _measures(found: dict[_Setting, _Runs], options: BenchOptions) -> list[Measure]:
    base = found[_RESIDENT]
    ratios = {
        setting.depth: Spread.of(its).median
        for setting, runs in found.items()
        if setting.depth and (its := _ratios(runs, base))
    }
    if not ratios:
        return []
    best = min(ratios, key=lambda depth: ratios[depth])
    compared = [_compared(runs, base) for runs in found.values() if runs.losses]
    return [
        Measure(f"step with offload at depth {best}, times resident", ratios[best], _LIMIT[options.device]),
        Measure("settings whose losses differ from resident", compared.count("DIFFERENT"), 0),
    ]


def _notes(options: BenchOptions, scale: _Scale) -> list[str]:
    devices = f"{scale.devices} GPU(s)" if options.device == "cuda" else f"the CPU with {options.threads} thread(s)"
    notes = [
        f"{options.runs} run(s) of {options.total_steps} steps in each setting, in turns, the first {options.warmup} "
        "of each not counted; ratios compare run by run",
        f"{scale.step_tokens:,} tokens and {scale.step_flops / 1e12:.3g} TFLOP a step: 6 a multiplied parameter and "
        "token, and the attention's products; nothing that is recomputed",
        f"limit, measured in this run: {scale.peak / 1e12:.3g} TFLOP/s on {devices}, in a product of square "
        f"{scale.dtype} matrices",
        "losses: those of all steps, beside those of the resident run, bit by bit",
    ]
    if options.device == "cpu":
        notes.append("no GPU: the job runs on the CPU, where the window is in host memory too")
    return notes
