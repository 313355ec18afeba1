"""The launchers by name, and what `engram launch` does with what was rendered for one."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from launch.cluster.failure import all_saved, first_failure
from launch.cluster.hosts import hostfile, hosts, local
from launch.cluster.kubernetes import kubernetes
from launch.cluster.layout import CONFIG, Launch, Rendered, quoted
from launch.cluster.processes import HostProcesses
from launch.cluster.slurm import slurm
from launch.local.failures import RankFailed
from launch.local.signals import Stopped
from train.errors import UserError

LAUNCHERS: dict[str, Callable[[Launch], Rendered]] = {
    "local": local,
    "hosts": hosts,
    "hostfile": hostfile,
    "slurm": slurm,
    "kubernetes": kubernetes,
}
"""The function that renders a launch, by launcher."""

_ELSEWHERE_S = 10.0
"""Seconds until the end of ranks that were killed after their grace is known here."""


def shown(rendered: Rendered) -> str:
    """Everything that would be written and run, for a reader."""
    folder = rendered.launch.folder
    parts = [f"==> {folder / name}\n{text}" for name, text in rendered.files.items()]
    code = [f"==> {rendered.launch.code}/\nthe code of {Path(__file__).parents[2]}\n"] if rendered.launch.code else []
    config = f"==> {folder / CONFIG}\nthe resolved config of {rendered.launch.job.run.name}\n"
    copies = "".join(f"tar -c -C {quoted(folder)} . | {' '.join(map(quoted, copy))}\n" for copy in rendered.copies)
    return "\n".join([*code, config, *parts, f"==> then\n{copies}{command_lines(rendered) or rendered.told}\n"])


def command_lines(rendered: Rendered) -> str:
    """The commands as one would type them in a shell."""
    variables = "".join(f"{name}={quoted(value)} " for name, value in rendered.environment.items())
    return "\n".join(variables + " ".join(map(quoted, command)) for command in rendered.commands)


def start(rendered: Rendered) -> None:
    """Runs the rendered commands, to their end.

    Raises:
        UserError: a rank reported one, or a command does not exist.
        RankFailed: the job failed; the message is that of the first rank that did.
        SystemExit: with `checkpoint.interrupted_exit`, after a signal at which the ranks saved their work.
        Stopped: a signal ended the job before the ranks saved their work.
    """
    launch, environment = rendered.launch, os.environ | rendered.environment
    checkpoint = launch.job.checkpoint
    try:
        if rendered.in_place:
            sys.stdout.flush()
            os.execvpe(rendered.commands[0][0], rendered.commands[0], environment)
        for copy in rendered.copies:
            _copy(launch.folder, copy)
        processes = HostProcesses(
            checkpoint.grace_s + _ELSEWHERE_S,
            may_fail=rendered.may_fail,
            attached=rendered.attached,
            ask=rendered.ask,
        )
        processes.run([(command, environment) for command in rendered.commands], launch.logs)
    except Stopped:
        if checkpoint.every and all_saved(launch.reports):
            raise SystemExit(checkpoint.interrupted_exit) from None
        raise
    except FileNotFoundError as error:
        raise UserError(
            f"{error.filename}: command not found; install it, or start the job from a machine that has it"
        ) from None
    except (UserError, RankFailed) as error:
        raise type(error)(first_failure(launch.reports) or f"{error}{_which(rendered)}") from None


def _copy(folder: Path, unpack: list[str]) -> None:
    with subprocess.Popen(["tar", "-c", "-C", str(folder), "."], stdout=subprocess.PIPE) as archive:
        done = subprocess.run(unpack, stdin=archive.stdout, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode or archive.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode or archive.returncode}"]
        raise UserError(f"{unpack[-2]}: cannot copy {folder} there ({reason[0]})")


def _which(rendered: Rendered) -> str:
    if len(rendered.commands) == 1:
        return ""
    return " (as counted from 0 in launch.hosts; 255 is ssh's own code: the host is lost, or lets nobody in)"
