"""FBGEMM's table-batched embedding on the CPU (package `fbgemm-gpu-cpu`), as TorchRec uses it."""

import torch
from torch import Tensor

from launch.bench.workload import DrawnSteps

_LEARNING_RATE = 1e-3
_EPS = 1e-8
_PACKAGE = "fbgemm_gpu"


class NotInstalled(Exception):
    """A contender's package is missing; the message says how to get it."""


class FbgemmEmbedding:
    """One table with exact row-wise Adagrad, fused into its backward.

    Bags of one lookup each, summed: the same rows as without pooling (`PoolingMode.NONE`), which takes this package
    three times as long on the CPU.

    Args:
        drawn: the ids of all steps.
        gradient_ND: fp32, what arrives at every lookup.

    Raises:
        NotInstalled: the package is missing, or was built for another PyTorch.
    """

    name = "FBGEMM on CPU, row-wise Adagrad"

    def __init__(self, drawn: DrawnSteps, gradient_ND: Tensor) -> None:
        self._drawn, self._gradient_ND = drawn, gradient_ND
        self._table = _table(drawn.workload.table_rows, drawn.workload.dim)
        self._offsets = torch.arange(drawn.workload.lookups + 1)

    def step(self, step: int) -> None:
        """Lookup, then backward with the update in it."""
        self._table(self._drawn.ids_PN[step], self._offsets).backward(self._gradient_ND)

    def close(self) -> None:
        """Frees the table."""
        del self._table


def _table(rows: int, dim: int) -> torch.nn.Module:
    try:
        from fbgemm_gpu.split_embedding_configs import EmbOptimType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
            ComputeDevice,
            SplitTableBatchedEmbeddingBagsCodegen,
        )
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != _PACKAGE:
            raise
        raise NotInstalled("not installed: pip install engram-pretrain[bench]") from None
    except (ImportError, OSError) as error:
        raise NotInstalled(f"installed, but does not load with torch {torch.__version__}: {error}") from None
    table = SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, dim, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=_LEARNING_RATE,
        eps=_EPS,
        pooling_mode=PoolingMode.SUM,
    )
    table.init_embedding_weights_uniform(-0.02, 0.02)
    return table
