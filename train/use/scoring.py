"""Loss of a saved run on any prepared text, by one process.

Shape suffixes: N documents, B sequences, T tokens of a sequence.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from train.data.order import epoch_order
from train.data.packing import IGNORED, Packed
from train.data.split import validation_mask
from train.data.store import TokenStore
from train.errors import UserError
from train.use.saved_run import SavedRun

Split = Literal["validation", "all"]


@dataclass(frozen=True)
class Score:
    """What a saved run makes of a text.

    Attributes:
        step: of the checkpoint.
        loss: mean cross-entropy of a predicted token, in nats.
        bits_per_byte: the same information spread over the bytes of the text: comparable between tokenizers.
        tokens: that were predicted: all but the first of each document and sequence.
        text_bytes: that these stand for.
    """

    step: int
    loss: float
    bits_per_byte: float
    tokens: int
    text_bytes: float


@torch.inference_mode()
def score(run: SavedRun, store: TokenStore, *, split: Split, sequences: int | None = None) -> Score:
    """Evaluates the run on a text, packed into sequences as in training.

    Args:
        run: the checkpoint.
        store: the text, of the run's tokenizer.
        split: `validation` takes what the run's config holds out, in the order of evaluation during training.
        sequences: takes the first ones only.

    Raises:
        UserError: the text has another tokenizer, or no token to predict.
    """
    _check_vocabulary(run, store)
    tables = run.tables(run.addresses(store))
    model = run.model()
    device = next(model.parameters()).device
    loss, tokens, text_bytes = torch.zeros((), dtype=torch.float64), 0, 0.0
    for packed in _batches(run, store, split, sequences):
        tokens_BT, labels_BT, positions_BT = map(torch.from_numpy, packed)
        memory = tables.look_up(tokens_BT, positions_BT, device) if tables else []
        batch_loss = model(tokens_BT.to(device), positions_BT.to(device), memory, labels_BT.to(device))
        loss += batch_loss.double().cpu()
        tokens += int((labels_BT != IGNORED).sum())
        text_bytes += store.bytes_of(packed.labels_BT)
    if not tokens or not text_bytes:
        raise UserError(f"{store.prefix}: no token to predict in the {split} documents; take more text, or --split all")
    total = float(loss)
    return Score(run.step, total / tokens, total / math.log(2) / text_bytes, tokens, text_bytes)


def _check_vocabulary(run: SavedRun, store: TokenStore) -> None:
    # Addresses tell tokenizers apart where there are tables; this does where there are none.
    if store.tokenizer_sha256 != run.tokenizer.sha256:
        raise UserError(
            f"{store.prefix}: its tokens are of another tokenizer than the run's; prepare the text with "
            f"engram data prepare TEXT --out DIR --tokenizer {run.folder / 'tokenizer.json'}"
        )


def _batches(run: SavedRun, store: TokenStore, split: Split, sequences: int | None) -> Iterator[Packed]:
    length, size = run.job.data.sequence_length, run.job.train.micro_batch_size
    lengths_N = np.diff(store.document_offsets)
    chosen_N = lengths_N > 0
    if split == "validation":
        chosen_N &= validation_mask(lengths_N, run.job.data.validation_fraction)
    # The one fixed order of evaluation during training.
    order = epoch_order(store.tokens, store.document_offsets, np.flatnonzero(chosen_N), length=length, seed=0, epoch=0)
    whole = -(-order.stream.num_tokens // length)
    wanted = whole if sequences is None else min(sequences, whole)
    for start in range(0, wanted, size):
        numbers = np.arange(start, min(start + size, wanted))
        yield order.stream.pack(numbers, length, store.pad_id)
