"""What a run does differently from what its config may have led one to expect."""

from collections.abc import Iterator, Sequence

from train.config.job import JobConfig
from train.data.batches.loader import Loader
from train.data.phases import begun_at
from train.data.stores.shards import ShardedTokens
from train.loaders import HeldOut
from train.optim.schedule import lr_factor


def notes(job: JobConfig, training: Loader, held_out: Sequence[HeldOut], world_size: int) -> Iterator[str]:
    """A line for each, to be told at the start.

    Args:
        job: its config.
        training: what it is trained on.
        held_out: what is evaluated.
        world_size: number of ranks.
    """
    yield from _repeated(job, training)
    yield from _phases(job, training)
    yield from _fetched_often(job, training)
    for name, share in training.lines.padding().items():
        yield f"best-fit packing{f' of {name}' if name else ''}: {share:.2%} of the tokens are padding"
    for name, _, validation in held_out:
        if not validation.num_documents:
            why = "data.validation_fraction is 0" if not validation.validation_fraction else "it takes two documents"
            yield f"no evaluation{f' on {name}' if name else ''}: no document is held out, as {why}"
    parts = job.train.global_batch_size // world_size // job.train.micro_batch_size
    if job.train.dtype == "bf16" and job.deepspeed.zero_optimization.stage == 0 and parts > 1:
        yield f"gradients of {parts} micro-batches are summed in bf16: deepspeed.zero_optimization.stage=1 takes fp32"


def _repeated(job: JobConfig, training: Loader) -> Iterator[str]:
    if len(training.sources) == 1:
        epochs = next(iter(training.seen(job.train.steps).values())).epochs
        if epochs > 1:
            all_tokens = f"{epochs:,.1f} epochs of {training.num_tokens:,} tokens"
            yield f"the text repeats: {job.train.steps:,} steps are {all_tokens}"
        return
    for source in training.sources:
        tokens, epochs = training.seen(job.train.steps)[source.name]
        if epochs > source.epochs:
            yield (
                f"{source.name} repeats: this run takes {tokens:,} tokens of it, {epochs:,.1f} epochs, more than the "
                f"{source.epochs:g} of its epochs; lower its weight, or raise epochs"
            )


def _phases(job: JobConfig, training: Loader) -> Iterator[str]:
    begins = begun_at(job.data, job.train.global_batch_size)
    if len(begins) == 1:
        return
    starts = training.phase_starts(job.train.steps)
    for number, (begin, step) in enumerate(zip(begins, starts, strict=False), start=1):
        whole = sum(source.amount for source in begin.mix)
        mix = "".join(f"{source.called} {source.amount / whole:.1%}, " for source in begin.mix)
        rate = job.optimizer.learning_rate * lr_factor(job.schedule, step, job.train.steps)
        yield f"phase {number} from step {step + 1}: {mix}{begin.length:,} tokens a sequence, learning rate {rate:.2e}"
    for number in range(len(starts), len(begins)):
        yield f"phase {number + 1} is never reached: it begins after {begins[number].first:,} batches"


def _fetched_often(job: JobConfig, training: Loader) -> Iterator[str]:
    if job.data.shuffle_window is not None:
        return
    for source in training.sources:
        tokens = source.store.tokens
        if isinstance(tokens, ShardedTokens) and (shards := -(-len(tokens) // tokens.shard_tokens)) > tokens.room:
            yield (
                f"{source.name or 'the text'} has {shards:,} shards by URL, data.cache_bytes has room for "
                f"{tokens.room:,}, and all of it is shuffled: nearly each document takes a shard; set "
                f"data.shuffle_window, or raise data.cache_bytes"
            )
