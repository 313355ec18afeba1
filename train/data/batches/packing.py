"""Packing: documents laid end to end, cut into sequences of equal length, with their boundaries kept.

With T = 4 and the documents abcE and deE (E ends a document):

    tokens     a b c E | d e E .        . is padding
    labels     b c E x | e E x x        x is IGNORED: nothing predicts across a boundary
    positions  0 1 2 3 | 0 1 2 0        0 starts a document, or the rest of one at the start of a sequence

Legend: B sequences, T tokens of a sequence, N documents, P pieces (the part of one document in one sequence),
F tokens of all pieces.
"""

from typing import NamedTuple

import numpy as np

from train.data.stores.shards import Tokens

IGNORED = -100
"""Label of a token that predicts nothing: the last of its document, and padding."""


class Packed(NamedTuple):
    """Packed sequences, each array int64 [B, T]."""

    tokens_BT: np.ndarray
    """Token ids."""
    labels_BT: np.ndarray
    """The document's next token, or IGNORED. At the end of a sequence it lies in the next one."""
    positions_BT: np.ndarray
    """Position in the document, counted from its first token in this sequence."""


class Pieces(NamedTuple):
    """Where the documents' pieces lie that sequences are packed of."""

    starts_P: np.ndarray
    """int64: the first token of each, in the tokens of all documents."""
    lengths_P: np.ndarray
    """int64."""
    ended_P: np.ndarray
    """Whether its document ends with it."""
    row_P: np.ndarray
    """int64, ascending: the sequence that it is laid into, behind those before it."""


class DocumentStream:
    """Documents laid end to end in a given order.

    Attributes:
        num_tokens: of all of them.
    """

    def __init__(self, offsets_N: np.ndarray, order_N: np.ndarray) -> None:
        """Args: int64 offsets of all documents (one more than documents); which documents, in order."""
        lengths_N = offsets_N[order_N + 1] - offsets_N[order_N]
        present_N = lengths_N > 0
        self._sources_N = offsets_N[order_N[present_N]]
        self._ends_N = np.cumsum(lengths_N[present_N], dtype=np.int64)
        self.num_tokens = int(self._ends_N[-1]) if len(self._ends_N) else 0

    def pieces(self, sequences_B: np.ndarray, length: int) -> Pieces:
        """What sequences of `length` tokens are packed of: number k has the stream's tokens [k*length, (k+1)*length).

        Args:
            sequences_B: int64, numbers of the sequences, in any order.
            length: T.
        """
        begin_B = np.minimum(sequences_B * length, self.num_tokens)
        end_B = np.minimum(begin_B + length, self.num_tokens)
        first_B = np.searchsorted(self._ends_N, begin_B, side="right")
        last_B = np.searchsorted(self._ends_N, end_B, side="left")
        pieces_B = np.where(end_B > begin_B, last_B - first_B + 1, 0)
        row_P = np.repeat(np.arange(len(sequences_B)), pieces_B)
        document_P = _ramps(first_B, pieces_B)

        document_end_P = self._ends_N[document_P]
        document_begin_P = np.where(document_P > 0, self._ends_N[document_P - 1], 0)
        begin_P = np.maximum(document_begin_P, begin_B[row_P])
        end_P = np.minimum(document_end_P, end_B[row_P])
        starts_P = self._sources_N[document_P] + begin_P - document_begin_P
        return Pieces(starts_P, end_P - begin_P, end_P == document_end_P, row_P)


def pack(tokens: Tokens, pieces: Pieces, rows: int, length: int, pad_id: int) -> Packed:
    """Pieces of documents as sequences.

    Args:
        tokens: of all documents.
        pieces: which of them.
        rows: B.
        length: T, no less than the pieces of any row.
        pad_id: token to pad with. Padding counts as one document of its own.
    """
    starts_P, lengths_P, ended_P, row_P = pieces
    source_F = _ramps(starts_P, lengths_P)
    # A document's next token is the next one in memory; only its last token has none.
    label_F = tokens[np.minimum(source_F + 1, len(tokens) - 1)].astype(np.int64)
    piece_ends_P = np.cumsum(lengths_P) - 1
    label_F[piece_ends_P[ended_P]] = IGNORED

    filled_B = np.bincount(row_P, weights=lengths_P, minlength=rows).astype(np.int64)
    filled_BT = np.arange(length) < filled_B[:, None]
    tokens_BT = np.full(filled_BT.shape, pad_id, dtype=np.int64)
    labels_BT = np.full(filled_BT.shape, IGNORED, dtype=np.int64)
    positions_BT = np.arange(length) - filled_B[:, None]
    tokens_BT[filled_BT] = tokens[source_F]
    labels_BT[filled_BT] = label_F
    positions_BT[filled_BT] = _ramps(np.zeros_like(lengths_P), lengths_P)
    return Packed(tokens_BT, labels_BT, positions_BT)


def _ramps(starts_P: np.ndarray, lengths_P: np.ndarray) -> np.ndarray:
    """start, start + 1, ... of each length, one after another: int64 [sum of lengths]."""
    ends_P = np.cumsum(lengths_P)
    total = int(ends_P[-1]) if len(ends_P) else 0
    return np.arange(total) + np.repeat(starts_P - ends_P + lengths_P, lengths_P)
