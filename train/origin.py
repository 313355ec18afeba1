"""What a run begins with, and whether memory and disk have room for what it builds and saves."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from offload.host.limits import local_ranks, memory_limits, size_text
from train.checkpoint.listing import Found, find_checkpoint
from train.config.job import JobConfig
from train.data.tokenization.tokenizer import TOKENIZER, Tokenizer
from train.errors import UserError
from train.huggingface.folder import TensorFolder
from train.huggingface.names import is_folder


def choose_origin(job: JobConfig, checkpoints: Path, there: Sequence[Found]) -> Path | None:
    """The checkpoint of another run that this one begins with, if any; its own checkpoints take precedence.

    Args:
        job: its config.
        checkpoints: the folder of its checkpoints.
        there: the checkpoints in it, or in that of the node that has the most.

    Raises:
        UserError: `checkpoint.resume` does not fit what is there, or `checkpoint.init_from` names no checkpoint.
    """
    resume = job.checkpoint.resume
    if resume == "never" and there:
        raise UserError(
            f"checkpoint.resume is never, but {there[-1].path} exists: choose another run.name, or delete "
            f"{checkpoints.parent}"
        )
    if resume == "must" and not there:
        raise UserError(f"checkpoint.resume is must, but {checkpoints} holds no checkpoint")
    source = job.checkpoint.init_from
    return find_checkpoint(source, "checkpoint.init_from") if source and not there else None


def require_tokenizer(origin: Path, tokenizer: str) -> None:
    """Raises UserError if a folder of Hugging Face's has another tokenizer than the one of SHA-256 `tokenizer`.

    Of the library's own files, which say the same in other words, an export of ours knows the checksum of before.
    """
    if not is_folder(origin) or not (origin / TOKENIZER).is_file():
        return
    known = TensorFolder(origin).config.get("engram_pretrain", {}).get("tokenizer_sha256")
    if tokenizer not in (known, Tokenizer.load(origin).sha256):
        raise UserError(
            f"checkpoint.init_from: {origin} has another tokenizer than the text; prepare the text with --tokenizer "
            f"{origin}"
        )


def require_memory(parameters: int) -> None:
    """Raises UserError unless this machine's ranks can build a model with that many parameters, each for itself."""
    ranks = local_ranks()
    for limit in memory_limits():
        needed = 4 * parameters * (ranks if limit.shared else 1)
        if needed > limit.free:
            raise UserError(
                f"the backbone has {parameters / 1e9:,.1f}B parameters: {size_text(needed)} of host memory in fp32 "
                f"while {ranks} rank(s) build it, but {limit.source} leaves {size_text(limit.free)}; lower "
                "model.hidden_size, model.num_layers, model.vocab_size or model.moe.num_experts, or start fewer ranks "
                "here"
            )


def require_disk(job: JobConfig, folder: Path, checkpoint_bytes: int, there: int) -> None:
    """Raises UserError unless the disk has room for the checkpoints that the run will keep.

    Args:
        job: its config.
        folder: of the run.
        checkpoint_bytes: of one checkpoint on this disk, at most.
        there: checkpoints that it has.
    """
    if job.checkpoint.every is None:
        return
    # The newest one is complete before the oldest goes.
    most = job.checkpoint.keep + 1 + bool(job.checkpoint.incremental)
    needed = checkpoint_bytes * max(1, most - there)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder}: a checkpoint takes up to {checkpoint_bytes / 1e9:.1f} GB with every table row "
            f"touched, those to come up to {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free: set run.dir to a "
            "larger disk, or lower checkpoint.keep or model.engram.rows_per_head"
        )
