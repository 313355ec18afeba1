"""A batch script for Slurm, whose srun starts every rank as a task."""

import signal

from launch.cluster.layout import (
    RANK_SCRIPT,
    Launch,
    Rendered,
    continued,
    exports,
    quoted,
    rank_script,
    script,
)
from train.errors import UserError

_BATCH = "job.sbatch"
_SPARE_S = 30
"""Seconds that a step in the middle of its work may need before it notices the signal."""

_ENDED_AT_START = 128 + signal.SIGTERM
"""srun's exit code when the signal came before the first step, with nothing to save: Slurm takes that for a failure."""


def slurm(launch: Launch) -> Rendered:
    """The batch script, and the command that submits it.

    Raises:
        UserError: the job names no ranks per node or no cores per rank, or its nodes do not see the script.
    """
    if launch.job.run.local_checkpoints:
        raise UserError(
            "run.local_checkpoints: Slurm's nodes read the launch from run.dir, so they must share it; use --on hosts "
            "for nodes that share no disk"
        )
    launch = launch.requeued()
    files = {RANK_SCRIPT: rank_script(launch), _BATCH: batch_script(launch)}
    return Rendered(launch, files, [["sbatch", str(launch.folder / _BATCH)]], in_place=True, queue=True)


def batch_script(launch: Launch) -> str:
    """The batch script. It requeues itself when the run was interrupted and has saved what there was."""
    job, wanted = launch.job, launch.job.launch.slurm
    if wanted.cpus_per_rank is None:
        raise UserError(
            "launch.slurm.cpus_per_rank is null: set it to the cores per rank, since srun would give each only one"
        )
    srun = continued(
        "srun --kill-on-bad-exit=1 --input=none",
        f"--cpus-per-task={wanted.cpus_per_rank}" + (" --gpu-bind=none" if launch.gpus else ""),
        f"bash {quoted(launch.folder / RANK_SCRIPT)}",
    )
    codes = f"{job.checkpoint.interrupted_exit}|{_ENDED_AT_START}"
    again = [f'case "$code" in {codes}) scontrol requeue "$SLURM_JOB_ID" && exit 0 ;; esac']
    failure = f"{quoted(launch.python)} -P -m launch.cluster.failure {quoted(launch.reports)}"
    lines = [f"#SBATCH {option}" for option in _options(launch)]
    return script(
        f"The run {job.run.name}: each task of srun finds its place in what Slurm sets.",
        *lines,
        *exports({"PYTHONPATH": str(launch.code)} if launch.code else {}),
        "code=0",
        f"{srun} || code=$?",
        *(again if wanted.requeue else []),
        'if [ "$code" -ne 0 ]; then',
        f"  {failure}",
        "fi",
        'exit "$code"',
    )


def _options(launch: Launch) -> list[str]:
    job, wanted = launch.job, launch.job.launch.slurm
    limit, signal_s = job.launch.time_limit_min, job.checkpoint.grace_s + _SPARE_S
    return [
        f"--job-name={job.run.name}",
        f"--nodes={job.launch.nodes}",
        f"--ntasks-per-node={launch.ranks}",
        f"--cpus-per-task={wanted.cpus_per_rank}",
        *([f"--gpus-per-node={launch.gpus}"] if launch.gpus else []),
        *([f"--partition={quoted(wanted.partition)}"] if wanted.partition else []),
        *([f"--account={quoted(wanted.account)}"] if wanted.account else []),
        *([f"--time={limit}", f"--signal=TERM@{signal_s:.0f}"] if limit else []),
        "--requeue" if wanted.requeue else "--no-requeue",
        f"--output={quoted(str(launch.folder / 'job.log').replace('%', '%%'))}",
        "--open-mode=append",
        *wanted.options,
    ]
