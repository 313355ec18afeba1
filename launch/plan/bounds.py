"""Sizes that no machine has, refused before anything is imported or built."""

from math import prod
from pathlib import Path

from model.config import ModelConfig
from train.config.job import JobConfig
from train.errors import UserError

MOST_PARAMETERS = 10**14
"""Of a backbone or of the tables: a hundred times the largest that have been published."""
MOST_TOKENS = 1 << 31
"""Of a step."""
MOST_HEADS = 4096
"""Sub-tables of all layers: for each one the next prime is searched for."""


def check_sizes(job: JobConfig, ranks: int) -> None:
    """Raises UserError, in one line with the key, if the job is larger than anything or does not divide over ranks."""
    model, train, engram = job.model, job.train, job.model.engram
    tokens = train.global_batch_size * job.data.longest
    _at_most("model: parameters of the backbone, roughly", _rough_parameters(model), MOST_PARAMETERS)
    _at_most("train.global_batch_size times data.sequence_length", tokens, MOST_TOKENS)
    if engram is not None:
        _at_most(
            "model.engram: layers times orders times heads", len(engram.layers) * engram.lookups_per_token, MOST_HEADS
        )
        parameters = prod((len(engram.layers), engram.lookups_per_token, engram.rows_per_head, engram.row_dim))
        _at_most("model.engram: parameters of the tables", parameters, MOST_PARAMETERS)
    _check_division(job, ranks)


def _check_division(job: JobConfig, ranks: int) -> None:
    sequences, micro = job.train.global_batch_size, job.train.micro_batch_size
    if sequences % (ranks * micro):
        raise UserError(
            f"train.global_batch_size: {sequences} sequences cannot be split over {ranks} ranks in micro-batches of "
            f"{micro}: make it a multiple of {ranks * micro}, or change --nodes, --gpus-per-node or "
            "train.micro_batch_size"
        )
    try:
        job.deepspeed.check(ranks, job.model.moe.num_experts if job.model.moe else None)
    except ValueError as error:
        raise UserError(str(error)) from None


def _rough_parameters(model: ModelConfig) -> int:
    width, attention, moe = model.hidden_size, model.attention, model.moe
    heads = attention.heads * (2 * attention.qk_nope_dim + attention.qk_rope_dim + 2 * attention.v_dim)
    ffn = 3 * model.dense_hidden_size
    if moe is not None:
        ffn = max(ffn, 3 * moe.expert_hidden_size * (moe.num_experts + moe.shared_experts))
    return width * (2 * model.vocab_size + model.num_layers * (heads + ffn))


def _at_most(what: str, value: int, most: int) -> None:
    if value > most:
        raise UserError(f"{what}: {value:,} is beyond {most:,}, the largest that is planned for")


def check_simulated(job: JobConfig, worlds: tuple[int, ...], growing: int, plot: str | None) -> None:
    """Raises UserError, in one line, if there is nothing to simulate or nowhere to draw it."""
    check_sizes(job, 1)
    if job.model.engram is None:
        raise UserError(f"{job.run.name} has no Engram tables (model.engram): there is nothing to simulate")
    tokens = growing * max(worlds) * job.data.sequence_length
    _at_most("--sequences-per-rank times the largest of --worlds times data.sequence_length", tokens, MOST_TOKENS)
    if plot is not None and not Path(plot).parent.is_dir():
        raise UserError(f"--plot {plot}: there is no folder {Path(plot).parent}")
