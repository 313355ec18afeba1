"""A run's folder, taken for this run: nobody else is at work in it, and its checkpoints are what the config expects."""

from pathlib import Path
from typing import Any

import torch.distributed as dist

from train.checkpoint.checkpoints import Checkpoints
from train.checkpoint.listing import checkpoints_in
from train.checkpoint.together import on_rank_0
from train.config.file import dump
from train.config.job import JobConfig, anchored
from train.config.yaml_text import render
from train.data.tokenization.tokenizer import Tokenizer
from train.files import new_file
from train.origin import choose_origin, require_disk
from train.report.skipped import SKIPPED_FILE
from train.report.summary import SUMMARY_FILE
from train.run_folder import BASE_FILE, CONFIG_FILE, LOG_FILE, require_writable
from train.run_lock import lock_run


class TakenFolder:
    """Holds the lock of a run's folder as long as it lives.

    Made by all ranks together: rank 0's view of the folder decides, or those of all nodes.

    Args:
        job: its config.
        checkpoints: of the run.
        checkpoint_bytes: of one checkpoint, all ranks' parts together, at most.

    Attributes:
        path: the folder.
        origin: the checkpoint of another run that this one begins with; None for none.
        leads: whether this rank is the one that looks after the folder: rank 0, or one of each node.

    Raises:
        UserError: another run is at work in it, its checkpoints do not fit the config, or its disk is too small.
        OSError: a file in it cannot be written.
    """

    def __init__(self, job: JobConfig, checkpoints: Checkpoints, checkpoint_bytes: int) -> None:
        self._job, self._nodes, self._checkpoint_bytes = job, checkpoints.nodes, checkpoint_bytes
        self.path, self.leads = Path(job.run.dir) / job.run.name, self._nodes.leads
        found = self._nodes.on_leaders(lambda: checkpoints_in(checkpoints.folder))
        self.origin = on_rank_0(lambda: choose_origin(job, checkpoints.folder, max(found.values(), key=len)))
        self._nodes.on_leaders(lambda: self._take(len(found[dist.get_rank()])))

    def record(self, tokenizer: Tokenizer, base: tuple[str, dict[str, Any]] | None = None) -> None:
        """Writes config, tokenizer and what the config was made from, once they are known to fit what is there."""
        if self.leads:
            # A run that goes on from its own config keeps the base that it had.
            if base is not None and Path(base[0]).resolve() != (self.path / CONFIG_FILE).resolve():
                with new_file(self.path / BASE_FILE) as partial:
                    partial.write_text(render({"name": base[0], "values": anchored(base[1])}), encoding="utf-8")
            dump(self._job.model_copy(update={"data": self._job.data.anchored()}), self.path / CONFIG_FILE)
            tokenizer.save(self.path)

    def _take(self, there: int) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = lock_run(self.path)
        require_writable(self.path, LOG_FILE, SKIPPED_FILE, SUMMARY_FILE)
        ranks_here = len(self._nodes.beside(dist.get_rank()))
        require_disk(self._job, self.path, self._checkpoint_bytes * ranks_here // dist.get_world_size(), there)
