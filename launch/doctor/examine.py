"""All checks of a machine, for a job if there is one; under a launcher those of all its hosts, reported by rank 0."""

import socket
from pathlib import Path

import torch
import torch.distributed as dist

from launch.cluster.place import Place
from launch.doctor.check import Check
from launch.doctor.disk import disk
from launch.doctor.memory import memory
from launch.doctor.network import network
from launch.doctor.ranks import between_ranks
from launch.doctor.software import compilers, gpus, software
from launch.local.environment import may_use_gpus, rank_count
from launch.plan.figures import plan
from train.config.job import JobConfig
from train.ranks import join_ranks

_BACKBONE_BYTES = 12  # of a parameter in a checkpoint
_RUNS = Path("runs")

Findings = dict[str, list[Check]]


def examine(job: JobConfig | None, place: Place | None) -> Findings:
    """What each host has and lacks; under a launcher (`place`) collective, and complete on rank 0 alone.

    Raises:
        UserError: the ranks do not find each other.
    """
    host = socket.gethostname()
    if place is None:
        return {host: checks_here(job, None)}
    device = join_ranks()
    mine = checks_here(job, place) if place.local_rank == 0 else []
    everyones: list[tuple[str, list[Check]] | None] = [None] * place.world_size
    dist.all_gather_object(everyones, (host, mine) if place.local_rank == 0 else None)
    local = job is not None and job.run.local_checkpoints
    together = between_ranks(device, _folder(job), place.local_rank, local=local)
    dist.destroy_process_group()
    # What ranks find together is every host's finding.
    return {host: [*checks, *together] for host, checks in filter(None, everyones)}


def checks_here(job: JobConfig | None, place: Place | None) -> list[Check]:
    """The checks that a machine makes by itself."""
    tables, checkpoints, wanted = _needs(job, place)
    settings = job.launch if job else None
    port = job.run.port if job and place is None else None
    return [
        *software(),
        *compilers(),
        *gpus(wanted),
        *memory(tables),
        *disk(_folder(job), checkpoints),
        *network(port, settings.hosts if settings else []),
    ]


def _folder(job: JobConfig | None) -> Path:
    return Path(job.run.dir, job.run.name) if job else _RUNS


def _needs(job: JobConfig | None, place: Place | None) -> tuple[int, int, int | None]:
    """Bytes that this host keeps of the tables, bytes of the checkpoints to come, GPUs that the job takes here."""
    if job is None:
        return 0, 0, None
    gpus_here = torch.cuda.device_count() if may_use_gpus() else 0
    here = place.local_world_size if place else rank_count(job.run.nproc, gpus_here)
    nodes = job.launch.node_count
    figures = plan(job, place.world_size if place else nodes * here)
    chosen = next((memory for memory in figures.host_memory if memory.chosen), None)
    stored = sum(table.parameters for table in figures.tables)
    saved = (figures.total - stored) * _BACKBONE_BYTES
    saved += sum(table.rows for table in figures.tables) * chosen.record_bytes if chosen else 0
    images = 0 if job.checkpoint.every is None else job.checkpoint.keep + 1
    if job.run.local_checkpoints:  # a host keeps what its own ranks write
        saved = saved * here // (place.world_size if place else nodes * here)
    # By itself a machine without GPUs trains on the CPU; nodes of a launcher were requested with one per rank.
    takes_gpus = gpus_here or (place is not None and job.run.nproc is not None)
    wanted = job.launch.gpus if job.launch.gpus is not None else (here if takes_gpus else None)
    return (chosen.bytes_per_rank * here if chosen else 0), saved * images, wanted
