"""The loss of each source of a mixture, added up over steps.

Shape suffixes: B sequences of a micro-batch, T tokens of a sequence, S sources.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from train.data.batches.batch import Batch
from train.forward import sent


class SourceLosses:
    """Sums by source; without any name it does nothing.

    Args:
        names: of the sources, by number.
        device: of the losses.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self._names, self._device = names, device
        self.restart()

    def restart(self) -> None:
        """Forgets all steps."""
        self._losses_S = torch.zeros(len(self._names), dtype=torch.float64, device=self._device)
        self._labels_S = torch.zeros(len(self._names), dtype=torch.float64)

    def of(self, batch: Batch) -> Callable[[Tensor], None] | None:
        """What takes a micro-batch's losses [B, T]; None where nothing is to be told apart."""
        if batch.sources_B is None or not self._names:
            return None
        # A product, since sums in the order of arrival would differ from run to run.
        of_SB = (torch.arange(len(self._names))[:, None] == batch.sources_B).double()
        self._labels_S += of_SB @ (batch.labels_BT >= 0).sum(dim=1).double()
        there_SB = sent(of_SB, self._device)

        def add(losses_BT: Tensor) -> None:
            self._losses_S += there_SB @ losses_BT.detach().double().sum(dim=1)

        return add

    def take(self) -> dict[str, float]:
        """The mean loss of each source that had a label, over all ranks. Collective."""
        if not self._names:
            return {}
        sums = torch.stack([self._losses_S, self._labels_S.to(self._device)])
        dist.all_reduce(sums)
        found = zip(self._names, *sums.tolist(), strict=True)
        return {name: loss / labels for name, loss, labels in found if labels}
