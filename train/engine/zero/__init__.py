"""Where each of DeepSpeed's optimizer wrappers keeps weights and gradients: everything that depends on their internals.

DeepSpeed 0.19.8 picks the wrapper by ZeRO stage and dtypes (`runtime/engine.py`, `_do_optimizer_sanity_check`):

    stage  fp32                     bf16                     gradients are accumulated
    0      none                     FP16_UnfusedOptimizer    in the parameters' dtype, in `parameter.grad`
    1      DeepSpeedZeroOptimizer   BF16_Optimizer           in fp32, in `parameter.grad` or a flat buffer
    2      DeepSpeedZeroOptimizer   DeepSpeedZeroOptimizer   in fp32, in the owned partition
    3      ..._Stage3               ..._Stage3               in fp32, in the owned partition

In all of them the raw averaged gradients stay as they are between the last backward and the step, because our base
optimizer is not one that DeepSpeed knows: with its own Muon, orthogonalisation already happens while gradients are
reduced.

All but the first compute a norm of their own in `step` and read it, so that the host waits for the device once more, or
twice. The engine knows the norm by then, and whether it is finite: `Wrapper.trust_gradients` removes theirs.
"""

from typing import Any

from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from train.engine.zero.stage_0 import Plain, Unfused
from train.engine.zero.stage_3 import FullyPartitioned
from train.engine.zero.stages_1_and_2 import Partitioned, PartitionedBf16
from train.engine.zero.wrapper import Wrapper
from train.optim.backbone import BackboneOptimizer

_WRAPPERS: dict[type, type[Wrapper]] = {
    BackboneOptimizer: Plain,
    FP16_UnfusedOptimizer: Unfused,
    DeepSpeedZeroOptimizer: Partitioned,
    BF16_Optimizer: PartitionedBf16,
    DeepSpeedZeroOptimizer_Stage3: FullyPartitioned,
}


def wrap(optimizer: Any) -> Wrapper:
    """The access to whatever `deepspeed.initialize` returned as optimizer; RuntimeError for an unknown one."""
    if type(optimizer) not in _WRAPPERS:
        raise RuntimeError(f"DeepSpeed wrapped the optimizer in a {type(optimizer).__name__}, which is not supported")
    return _WRAPPERS[type(optimizer)](optimizer)
