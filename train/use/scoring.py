"""Loss of a saved run on any prepared text, by one process.

Shape suffixes: N documents, B sequences, T tokens of a sequence.
"""

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from train.data.batches.batch import Batch
from train.data.batches.order import epoch_order
from train.data.batches.packing import pack
from train.data.blend import Blend
from train.data.stores.split import validation_mask
from train.data.stores.store import TokenStore
from train.errors import UserError
from train.evaluation import Evaluation, evaluate
from train.use.saved_run import SavedRun

Split = Literal["validation", "all"]


def score(run: SavedRun, store: TokenStore, *, split: Split, sequences: int | None = None) -> Evaluation:
    """Evaluates the run on a text, packed into sequences as in training.

    Args:
        run: the checkpoint.
        store: the text, of the run's tokenizer.
        split: `validation` takes what the run's config holds out, in the order of evaluation during training.
        sequences: takes the first ones only.

    Raises:
        UserError: the text has another tokenizer, or no token to predict.
    """
    found = Evaluation.of(_sums(run, store, split, sequences))
    if found is None:
        raise UserError(f"{store.prefix}: no token to predict in the {split} documents; use more text, or --split all")
    return found


def _sums(run: SavedRun, store: TokenStore, split: Split, sequences: int | None) -> Tensor:
    """What `evaluate` returns."""
    _check_vocabulary(run, store)
    model = run.model()
    text = _batches(run, store, split, sequences)
    device = next(model.parameters()).device
    return evaluate(
        model, run.tables(run.addresses(store)), text, lambda labels: store.bytes_of(labels.numpy()), device
    )


def score_blend(run: SavedRun, blend: Blend, *, split: Split, sequences: int | None = None) -> Evaluation:
    """The same for the run's own sources: `sequences` of each, weighted with their shares of the first phase."""
    if len(blend.sources) == 1:
        return score(run, blend.store, split=split, sequences=sequences)
    weights = blend.phases[0].weights
    found = {
        source.name: (weight / sum(weights), _sums(run, source.store, split, sequences))
        for source, weight in zip(blend.sources, weights, strict=True)
    }
    evaluation = Evaluation.of_sources([(name, share, sums) for name, (share, sums) in found.items()])
    if evaluation is None:
        raise UserError(f"{', '.join(found)}: no token to predict in the {split} documents; use more text")
    return evaluation


def _check_vocabulary(run: SavedRun, store: TokenStore) -> None:
    # Addresses tell tokenizers apart where there are tables; this does where there are none.
    if store.tokenizer_sha256 != run.tokenizer.sha256:
        raise UserError(
            f"{store.prefix}: its tokens come from another tokenizer than the run's; prepare the text with "
            f"engram data prepare TEXT --out DIR --tokenizer {run.folder / 'tokenizer.json'}"
        )


def _batches(run: SavedRun, store: TokenStore, split: Split, sequences: int | None) -> Iterator[Batch]:
    length, size = run.job.data.sequence_length, run.job.train.micro_batch_size
    lengths_N = np.diff(store.document_offsets)
    chosen_N = lengths_N > 0
    if split == "validation":
        chosen_N &= validation_mask(lengths_N, run.job.data.validation_fraction)
    # The one fixed order of evaluation during training.
    order = epoch_order(store.document_offsets, np.flatnonzero(chosen_N), length=length, seed=0, epoch=0)
    whole = -(-order.stream.num_tokens // length)
    wanted = whole if sequences is None else min(sequences, whole)
    for start in range(0, wanted, size):
        numbers = np.arange(start, min(start + size, wanted))
        pieces = order.stream.pieces(numbers, length)
        yield Batch(*map(torch.from_numpy, pack(store.tokens, pieces, len(numbers), length, store.pad_id)))
