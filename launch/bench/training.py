"""Part `train`: a training step with its rows coming from host memory, by look-ahead, beside all rows resident."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from launch.bench.deadline import Deadline
from launch.bench.measure import Spread
from launch.bench.options import BenchOptions
from launch.bench.peak import peak_of
from launch.bench.progress import Progress
from launch.bench.report import Cell, Measure, Section
from launch.bench.train_run import train_run
from train.errors import UserError

_LIMIT = {"cuda": 1.01, "cpu": 1.03}
_LEFT_OUT = "left out: no time was left"
# A record waits for its step to end, and keeps the host from preparing the next one meanwhile.
_LOG_EVERY = {"cuda": 5, "cpu": 1}
_TRACED_STEPS = 3
_COMPARED = ("loss", "grad_norm", "val_loss")


class _Setting(NamedTuple):
    mode: str
    depth: int | None

    @property
    def name(self) -> str:
        """For a file."""
        return self.mode if self.depth is None else f"{self.mode}-depth-{self.depth}"


_RESIDENT = _Setting("resident", None)
# What matters most comes first: a benchmark that is cut short has it.
_SETTINGS = (_RESIDENT, *(_Setting("window", depth) for depth in (2, 1, 4, 0)))


@dataclass
class _Runs:
    """What the runs of a setting came to: times of all timed steps, one entry a run, and why one of them failed."""

    step_ms: list[float] = field(default_factory=list)
    stall_ms: list[float] = field(default_factory=list)
    medians: dict[int, float] = field(default_factory=dict)
    results: list[list[tuple[float | None, ...]]] = field(default_factory=list)
    failed: str | None = None


@dataclass(frozen=True)
class _Scale:
    """What a step computes, and what it could compute in a second."""

    step_tokens: int
    step_flops: float
    dtype: str
    devices: int
    peak: float


def measure_training(
    options: BenchOptions,
    peak: Section,
    progress: Progress,
    so_far: Callable[[Section], None] = lambda section: None,
) -> Section:
    """Trains the job of `options.job` in every setting, `options.runs` times each, in turns.

    Args:
        options: how to measure; `seconds` counts from now.
        peak: what part `peak` found.
        progress: to report to.
        so_far: is given what is known after every run.

    Raises:
        UserError: the job can be trained in no setting; in the words of `engram train`.
    """
    deadline, scale = Deadline(options.seconds), _scale(options, peak)
    progress.expect(options.runs * len(_SETTINGS) * options.total_steps)
    found = {setting: _Runs() for setting in _SETTINGS}
    last_s = 0.0
    for run in range(options.runs):
        for setting in _SETTINGS if run % 2 == 0 else _SETTINGS[::-1]:
            runs, first = found[setting], run == 0 and setting is _RESIDENT
            if runs.failed is not None or not (first or deadline.allows(last_s)):
                continue
            started = time.monotonic()
            try:
                _train(options, setting, run, runs)
            except UserError as error:
                runs.failed = str(error)
            last_s = time.monotonic() - started
            progress.advance(options.total_steps)
            so_far(_section(options, found, scale))
    failed = [runs.failed for runs in found.values() if runs.failed is not None]
    if len(failed) == len(found) and not any(runs.step_ms for runs in found.values()):
        raise UserError(failed[0])
    return _section(options, found, scale)


def _section(options: BenchOptions, found: "dict[_Setting, _Runs]", scale: _Scale) -> Section:
    return Section(
        f"{options.job}: a training step by where the tables are",
        [_row(setting, runs, found[_RESIDENT], scale) for setting, runs in found.items()],
        _measures(found, options),
        _notes(options, scale),
    )


def _train(options: BenchOptions, setting: _Setting, run: int, runs: _Runs) -> None:
    every = _LOG_EVERY[options.device]
    last = options.warmup + -(-options.steps // every) * every
    steps, more = last, dict[str, object]()
    trace = Path(options.traces, f"{setting.name}.json.gz") if options.traces and not run else None
    if setting.depth is not None:
        more["offload__depth"] = setting.depth
    if options.traces:
        # In every run, so that all have the same steps and can be compared.
        more["train__profile"] = f"{{first: {last + 1}, steps: {_TRACED_STEPS}}}"
        steps += _TRACED_STEPS
    records = train_run(
        options.job,
        steps,
        device=options.device,
        overrides=options.overrides,
        trace=trace,
        train__log_every=every,
        offload__mode=setting.mode,
        **more,
    )
    # Each is a mean over the steps since the one before.
    timed = [record for record in records if options.warmup + every <= record["step"] <= last]
    runs.step_ms += [record["step_ms"] for record in timed]
    runs.stall_ms += [record["offload.stall_ms"] for record in timed if "offload.stall_ms" in record]
    runs.medians[run] = Spread.of([record["step_ms"] for record in timed]).median
    runs.results.append([tuple(record.get(name) for name in _COMPARED) for record in records])


def _scale(options: BenchOptions, peak: Section) -> _Scale:
    from launch.local.environment import rank_count, visible_gpus
    from model.census import take_census
    from model.flops import flops_per_token
    from train.config.file import load
    from train.config.job import JobConfig

    job = load(options.job, options.overrides, JobConfig)
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
        "status": "measured" if step else runs.failed or _LEFT_OUT,
    }


def _compared(runs: _Runs, base: _Runs) -> str | None:
    if not runs.results or not base.results:
        return None
    return "the same bits" if all(results == base.results[0] for results in runs.results) else "DIFFERENT"


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
    compared = [_compared(runs, base) for runs in found.values() if runs.results]
    return [
        Measure(f"step with offload at depth {best}, times resident", ratios[best], _LIMIT[options.device]),
        Measure("settings whose losses differ from resident", compared.count("DIFFERENT"), 0),
    ]


def _notes(options: BenchOptions, scale: _Scale) -> list[str]:
    every = _LOG_EVERY[options.device]
    devices = f"{scale.devices} GPU(s)" if options.device == "cuda" else f"the CPU with {options.threads} thread(s)"
    notes = [
        f"at most {options.runs} run(s) in each setting, in turns, of {options.total_steps} steps or a few more; the "
        f"first {options.warmup} are not counted; ratios compare run by run",
        *([f"a step's time: the mean of {every}, after which the run waits for the GPU"] if every > 1 else []),
        f"{scale.step_tokens:,} tokens and {scale.step_flops / 1e12:.3g} TFLOP a step: 6 a multiplied parameter and "
        "token, and the attention's products; nothing that is recomputed",
        f"limit, measured in this run: {scale.peak / 1e12:.3g} TFLOP/s on {devices}, in a product of square "
        f"{scale.dtype} matrices",
        "losses: with gradient norms and the loss on held-out text at the end, of every run and record, beside those "
        "of the first resident run, bit by bit",
    ]
    if options.device == "cpu":
        notes.append("no GPU: the job runs on the CPU, where the window is in host memory too")
    return notes
