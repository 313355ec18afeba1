"""What the model is given at once.

Shape suffixes: B sequences of a micro-batch, T tokens of a sequence.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank, on the CPU.

    The documents of a sequence follow from the positions: `document = cumsum(positions == 0)`.
    """

    tokens_BT: Tensor
    """int64 token ids."""
    labels_BT: Tensor
    """int64 next tokens; IGNORED (-100) at the last token of a document and on padding."""
    positions_BT: Tensor
    """int64 positions in the document within this sequence; 0 starts a document, a rest of one, or padding."""
    sources_B: Tensor | None = None
    """int64 number of each sequence's source; None where there is one."""
