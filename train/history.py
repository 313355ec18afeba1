"""What a run has reported so far, where each node keeps its own files: it follows rank 0 to another node.

Of several nodes that have files, rank 0 was last on the one that wrote them last.
"""

from pathlib import Path

import torch.distributed as dist

from train.checkpoint.nodes import Nodes
from train.checkpoint.together import together
from train.files import new_file
from train.report.metrics import METRICS_FILE
from train.report.skipped import SKIPPED_FILE
from train.report.wandb_log import ID_FILE
from train.run_folder import LOG_FILE

FILES = (METRICS_FILE, SKIPPED_FILE, ID_FILE, LOG_FILE)
"""Those that rank 0 alone writes and appends to."""


def bring_history(folder: Path, nodes: Nodes, step: int) -> list[str]:
    """Brings them to rank 0's node from the one that has the latest. Collective.

    Args:
        folder: of the run.
        nodes: who sees which folder.
        step: steps that are done.

    Returns:
        What a user has to know, in lines.

    Raises:
        Failed: on all ranks, if files cannot be read or written.
    """
    if not nodes.several or step == 0:
        return []
    written = nodes.on_leaders(lambda: _last_written(folder))
    source = max(written, key=lambda leader: (written[leader], leader == 0))
    if written[source] < 0:
        return [f"{folder / METRICS_FILE} begins after step {step}: no node of this job has the earlier records"]
    if source == 0:
        return []
    rank = dist.get_rank()
    files: list[dict[str, bytes]] = [{}]
    together(lambda: files[0].update(_read(folder)) if rank == source else None, nodes.group)
    # They may be long: nobody else gets them.
    if rank == source:
        dist.send_object_list(files, 0, nodes.group)
    elif rank == 0:
        dist.recv_object_list(files, source, nodes.group)
    together(lambda: _write(folder, files[0]) if rank == 0 else None, nodes.group)
    return [f"metrics and log up to step {step} are from node {nodes.hosts[source]}, where rank 0 was before"]


def _last_written(folder: Path) -> int:
    path = folder / METRICS_FILE
    return path.stat().st_mtime_ns if path.exists() else -1


def _read(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES if (folder / name).exists()}


def _write(folder: Path, files: dict[str, bytes]) -> None:
    for name in FILES:
        if name not in files:
            (folder / name).unlink(missing_ok=True)  # of an earlier time
            continue
        with new_file(folder / name) as partial:
            partial.write_bytes(files[name])
