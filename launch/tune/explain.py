"""What a run's steps spend their time on, in words, with the setting that moves it: from its metrics alone."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offload.optimizers import OPTIMIZERS
from train.config.file import load
from train.config.job import JobConfig
from train.errors import UserError
from train.report.metrics import METRICS_FILE, read_metrics
from train.run_folder import CONFIG_FILE
from train.run_state import RunState

STAGES = ("plan", "fetch", "exchange", "forward", "backward", "reduce", "update", "other")
_RECORDS = 20
"""Of the newest ones, that count."""
_WAITS, _LARGE = 0.02, 0.1
"""Of a step: waiting that is worth a word; work beside the model that is."""
_DEEP, _BUSY = 4, 0.8
"""A look-ahead beyond which more hardly helps; the planner's share of a step from which on it is what limits."""

_MODEL = (
    "forward and backward of the model: what a step is for. On a GPU this is the host's time to give the work: if it "
    "is most of the step there, launches are the limit, and larger micro-batches or compiled blocks help"
)
_OTHERS = {
    "exchange": (
        "values of rows come from the ranks that own them, before the forward can begin: the network between ranks",
        "offload.exchange_dtype=bf16",
        "train.global_batch_size (fewer, larger steps)",
    ),
    "reduce": (
        "gradients are summed over ranks and their norm is waited for. On a GPU this is where the host waits for all "
        "that it gave: then the GPU is the limit, as it should be. On CPU ranks it is their network, or the slowest of "
        "them",
        "deepspeed.communication_data_type=bf16",
        "deepspeed.zero_optimization.stage (lower, if memory allows)",
        "train.global_batch_size (fewer, larger steps)",
    ),
    "update": (
        "the optimizers of backbone and rows",
        "offload.optimizer.untouched_rows=closed",
        "optimizer.name=adamw",
        "train.global_batch_size (fewer, larger steps)",
    ),
    "other": (
        "between steps: reading the batch, records, saves that do not run beside the loop, Python's collector",
        "train.log_every",
        "checkpoint.every",
    ),
}
"""By stage what it is, and what moves it."""


@dataclass(frozen=True)
class Finding:
    """What takes time, and what to set.

    Attributes:
        stage: of a step; `model` for forward and backward together.
        share: of the step.
        text: in words.
        settings: that move it, the likeliest first.
    """

    stage: str
    share: float
    text: str
    settings: tuple[str, ...]


@dataclass(frozen=True)
class Explained:
    """A run's step.

    Attributes:
        run: its folder.
        steps: first and last one that the figures are of.
        step_ms: of a step; the median over the records, as all figures are.
        stages_ms: of rank 0's loop; they add up to about the step.
        offload: what the tables did, by the names of the metrics; empty without.
        findings: the largest first: what the run waits for, then the rest.
    """

    run: str
    steps: tuple[int, int]
    step_ms: float
    stages_ms: dict[str, float]
    offload: dict[str, float]
    findings: list[Finding]

    def to_json(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "run": self.run,
            "steps": list(self.steps),
            "step_ms": self.step_ms,
            "stages_ms": self.stages_ms,
            "offload": self.offload,
            "findings": [vars(finding) | {"settings": list(finding.settings)} for finding in self.findings],
        }


def explained(run: Path) -> Explained:
    """What the newest records of a run say; the very first one, which has the start in it, does not count.

    Raises:
        UserError: there are no records with stages, or the config cannot be read.
    """
    job = load(run / CONFIG_FILE, [], JobConfig)
    path = run / METRICS_FILE
    records = [each for each in (read_metrics(path) if path.exists() else []) if "stages.forward_ms" in each]
    if not records:
        raise UserError(
            f"{path}: no record tells the stages of a step; the first one comes after train.log_every steps"
        )
    counted = (records[1:] or records)[-_RECORDS:]
    stages_ms = {stage: _median(counted, f"stages.{stage}_ms") for stage in STAGES}
    keys = {key for record in counted for key in record if key.startswith("offload.")}
    offload = {key.removeprefix("offload."): _median(counted, key) for key in sorted(keys)}
    step_ms = _median(counted, "step_ms")
    state = RunState.read(run)
    depth = job.offload.depth if job.offload.depth != "auto" else (state.look_ahead if state else None) or 1
    findings = sorted(_findings(job, depth, step_ms, stages_ms, offload), key=_waiting_first)
    steps = int(counted[0]["step"]), int(counted[-1]["step"])
    return Explained(str(run), steps, step_ms, stages_ms, offload, findings)


def _median(records: list[dict[str, float]], key: str) -> float:
    return statistics.median(record.get(key, 0.0) for record in records)


def _waiting_first(finding: Finding) -> tuple[bool, float]:
    waits = finding.stage in ("fetch", "plan") and finding.share > _WAITS
    return not waits, -finding.share


def _findings(
    job: JobConfig, depth: int, step_ms: float, stages_ms: dict[str, float], offload: dict[str, float]
) -> Iterator[Finding]:
    share = {stage: ms / step_ms for stage, ms in stages_ms.items()}
    if share["fetch"] > _WAITS:
        yield _fetching(job, depth, step_ms, share["fetch"], offload)
    if share["plan"] > _WAITS:
        yield _planning(job, depth, step_ms, share["plan"], offload)
    model = share["forward"] + share["backward"]
    yield Finding("model", model, _MODEL, _model_settings(job))
    for stage, told in _OTHERS.items():
        if share[stage] > _LARGE:
            yield Finding(stage, share[stage], told[0], told[1:])


def _fetching(job: JobConfig, depth: int, step_ms: float, share: float, offload: dict[str, float]) -> Finding:
    stall, hits = offload.get("stall_ms", share * step_ms), offload.get("hit_rate", 0.0)
    told = (
        f"the loop waits {stall:.1f} ms of {step_ms:.0f} for rows that are still on their way from host memory; "
        f"{hits:.0%} of a step's rows were in the window, {offload.get('fetch_rows', 0):,.0f} were fetched"
    )
    optimizer = job.offload.optimizer
    smaller = tuple(
        setting
        for setting, possible in (
            ("offload.row_dtype=bf16", job.offload.row_dtype == "fp32"),
            ("offload.optimizer.state_dtype=bf16",
             optimizer.state_dtype == "fp32" and "bf16" in OPTIMIZERS[optimizer.type].state_dtypes),
        )
        if possible
    )  # fmt: skip
    window = (f"offload.window_rows={2 * job.offload.window_rows}",)
    if depth < _DEEP:
        text = f"{told}. At look-ahead {depth} they have {max(depth, 0)} step(s) to come: give them more"
        return Finding("fetch", share, text, (f"offload.depth={max(1, 2 * depth)}", *window))
    text = f"{told}. At look-ahead {depth} it is the bus that is slow, not the start that is late: fewer bytes help"
    return Finding("fetch", share, text, (*window, *smaller))


def _planning(job: JobConfig, depth: int, step_ms: float, share: float, offload: dict[str, float]) -> Finding:
    works = offload.get("plan_ms", 0.0)
    told = f"the loop waits {share * step_ms:.1f} ms of {step_ms:.0f} for plans of coming steps"
    if works > _BUSY * step_ms:
        text = f"{told}; the planner works {works:.0f} ms for each step, as long as the step itself or nearly so"
        return Finding(
            "plan",
            share,
            text,
            (f"offload.planner_threads={2 * job.offload.planner_threads}", "offload.planner=device"),
        )
    text = (
        f"{told}, though the planner works only {works:.0f} ms for each: with several ranks it waits for the slowest, "
        "and a look-ahead gives it time; else other work takes its core"
    )
    return Finding("plan", share, text, (f"offload.depth={max(1, 2 * depth)}", "offload.planner=device"))


def _model_settings(job: JobConfig) -> tuple[str, ...]:
    return tuple(
        setting
        for setting, possible in (
            ("train.recompute=false", job.train.recompute),
            (f"train.micro_batch_size={2 * job.train.micro_batch_size}",
             job.train.micro_batch_size < job.train.global_batch_size),
            ("train.compile=true", not job.train.compile),
            ("train.dtype=bf16", job.train.dtype == "fp32"),
        )
        if possible
    )  # fmt: skip
