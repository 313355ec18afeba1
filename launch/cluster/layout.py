"""A launch: the job as its ranks will read it, where its files are, and the script that starts a rank."""

import shlex
import sys
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

from launch.cluster.started import LOGS, REPORTS
from train.config.job import JobConfig
from train.errors import UserError

INTERRUPTED_EXIT = 75
"""Exit code by which a queue tells an interrupted run that saved from a failed one (EX_TEMPFAIL)."""
_LAUNCHES = "launches"
_COMPILED = "compiled"
RANK_SCRIPT = "rank.sh"
CONFIG = "config.yaml"


@dataclass(frozen=True)
class Launch:
    """A job, and where its launch is on the nodes.

    Args:
        job: the job.
        folder: where its files are.
        written: folder for what its ranks write about themselves; in `launches` of the run's folder.
        workdir: the ranks' working directory.
        python: the interpreter.
        code: folder of the code that they run; None: what `python` has installed.
    """

    job: JobConfig
    folder: Path
    written: Path
    workdir: Path
    python: str = sys.executable
    code: Path | None = None

    @classmethod
    def next(cls, job: JobConfig) -> Self:
        """The next launch of a job, with this machine's folders; nothing of it exists yet."""
        launches = Path(job.run.dir, job.run.name, _LAUNCHES).absolute()
        known = [int(path.name) for path in launches.glob("[0-9]*") if path.name.isdecimal()]
        folder = launches / f"{max(known, default=0) + 1:04d}"
        return cls(job, folder, folder, Path.cwd(), code=folder / "code")

    def requeued(self) -> Self:
        """The same launch, with ranks whose exit code tells a queue that they were interrupted and saved."""
        if self.job.checkpoint.interrupted_exit:
            return self
        checkpoint = self.job.checkpoint.model_copy(update={"interrupted_exit": INTERRUPTED_EXIT})
        return replace(self, job=self.job.model_copy(update={"checkpoint": checkpoint}))

    def in_pod(self, files: Path, workdir: Path) -> Self:
        """The same launch as a pod sees it, with the scripts in `files` and the code of its image."""
        run = workdir / self.job.run.dir / self.job.run.name
        written = run / _LAUNCHES / self.folder.name
        return replace(self, folder=files, written=written, workdir=workdir, python="python", code=None)

    @property
    def ranks(self) -> int:
        """Ranks per node.

        Raises:
            UserError: the job does not say.
        """
        if self.job.run.nproc is None:
            raise UserError(
                "run.nproc is null: set it to the number of ranks per node, since other nodes' GPUs are not counted"
            )
        return self.job.run.nproc

    @property
    def gpus(self) -> int:
        """GPUs per node."""
        return self.ranks if self.job.launch.gpus is None else self.job.launch.gpus

    @property
    def port(self) -> int:
        """Where the ranks meet: the job's port, or one that other runs are unlikely to have."""
        return self.job.run.port or 20000 + zlib.crc32(str(self.folder).encode()) % 10000

    @property
    def logs(self) -> Path:
        """Folder for the logs of ranks other than 0."""
        return self.workdir / (self.job.launch.logs or self.run_folder / "logs")

    @property
    def run_folder(self) -> Path:
        """The run's folder, as its nodes see it."""
        return self.written.parents[1]

    @property
    def reports(self) -> Path:
        """Folder in which ranks that fail leave a report."""
        return self.written / "reports"


@dataclass(frozen=True)
class Rendered:
    """What a launcher is given.

    Args:
        launch: the launch, as the launcher needs it.
        files: texts in its folder, by name.
        commands: what starts it from here, one per host if there are several.
        copies: commands to run first, each of which unpacks the launch's folder elsewhere from a tar archive on its
            standard input.
        environment: variables for the commands.
        in_place: whether the command takes this process's place: it reports failures itself.
        queue: whether the command only puts the job into a queue.
        attached: whether the commands end, in their own time, when their standard input does.
        ask: what asks the ranks to end, in place of a signal to the command.
        may_fail: how many of the commands may fail.
        told: what the user is told to do, where there is no command.
    """

    launch: Launch
    files: dict[str, str]
    commands: list[list[str]] = field(default_factory=list)
    copies: list[list[str]] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    in_place: bool = False
    queue: bool = False
    attached: bool = False
    ask: list[str] = field(default_factory=list)
    may_fail: int = 0
    told: str = ""


def rank_script(launch: Launch) -> str:
    """The shell script that becomes one rank: `engram train` finds its place from what the launcher has set."""
    settings = launch.job.launch
    threads = settings.threads
    interface = settings.interface
    variables = {
        # A pod's own disk ends with it.
        **(
            {"PYTHONPATH": str(launch.code)} if launch.code else {"NUMBA_CACHE_DIR": str(launch.run_folder / _COMPILED)}
        ),
        LOGS: str(launch.logs),
        REPORTS: str(launch.reports),
        **({"OMP_NUM_THREADS": str(threads)} if threads else {}),
        **({"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface} if interface else {}),
        **({} if settings.gpus != 0 else {"DS_ACCELERATOR": "cpu"}),
        **settings.environment,
    }
    return script(
        f"One rank of the run {launch.job.run.name}.",
        "set -e",
        f"cd {quoted(launch.workdir)}",
        # torchrun sets it to 1 if it is unset; without it, a rank's share of the cores is the same on every launcher.
        *([] if threads else ["unset OMP_NUM_THREADS"]),
        *exports(variables),
        *settings.setup,
        f"exec {quoted(launch.python)} -P -m launch train {quoted(launch.folder / CONFIG)}",
    )


def script(what: str, *lines: str) -> str:
    """A shell script that begins with a comment on `what` it is."""
    return "\n".join(["#!/bin/bash", f"# {what}", *lines, ""])


def exports(variables: Mapping[str, str]) -> Iterable[str]:
    """One shell line for each variable."""
    return [f"export {name}={quoted(value)}" for name, value in variables.items()]


def quoted(word: str | Path) -> str:
    """A word quoted for the shell."""
    return shlex.quote(str(word))


def continued(*words: str) -> str:
    """One shell command, with one word per line."""
    return " \\\n  ".join(words)
