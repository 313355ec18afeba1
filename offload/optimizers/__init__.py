"""The row optimizers, by the name that `offload.optimizer.type` gives them.

A new one is a file beside these and an entry here: the config, the layout of records, `engram plan` and `engram bench`
read this list. Importing it does not import torch, since every command reads the config.
"""

from offload.optimizers.adam import Adam
from offload.optimizers.row_optimizer import RowOptimizer
from offload.optimizers.rowwise_adagrad import RowwiseAdagrad
from offload.optimizers.rowwise_rmsprop import RowwiseRmsprop
from offload.optimizers.sgd import Sgd

OPTIMIZERS: dict[str, type[RowOptimizer]] = {each.name: each for each in (Adam, RowwiseAdagrad, RowwiseRmsprop, Sgd)}
