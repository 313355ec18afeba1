"""What differs in the memory of a rank that computes on the processor, where tensors are memory of the process.

gradients  in fp32 at stage 1, with one micro-batch a step, a rank's part is made when activations are gone
buffers    the bucket of gradients, and what the update takes beyond the activations, in whose memory it is made
gathered   at stages 1 and 2 with several ranks: gloo gathers an optimizer group into a flat copy, and each of its two
           threads keeps memory for the largest
kept       launch/local/environment.py has the C library give nothing back; freed blocks leave gaps that later, larger
           ones do not fit into. So a process keeps more than its tensors take at their peak, by a share of what comes
           and goes in a step (gradients, activations, the bucket). `engram plan --calibrate` measures it, for steps of
           one micro-batch and of several: gradients that are added up lie between what comes and goes.
"""

from launch.plan.cluster import Cluster
from launch.plan.memory.backbone import BackboneBytes, Matrices
from train.config.job import JobConfig

_GLOO_THREADS = 2  # torch/csrc/distributed/c10d/ProcessGroupGloo.hpp
_FLOAT = 4


def processor_parts(
    job: JobConfig, cluster: Cluster, counted: Matrices, backbone: BackboneBytes, activations: float
) -> dict[str, float]:
    """Bytes of these parts; `activations` is their peak."""
    stage, fp32 = job.deepspeed.zero_optimization.stage, job.train.dtype == "fp32"
    adds = job.train.global_batch_size > cluster.ranks * job.train.micro_batch_size
    late = backbone.gradients if stage == 1 and fp32 and not adds else 0.0
    gradients = backbone.gradients - late
    gathers = cluster.ranks > 1 and stage in (1, 2)
    group = max(counted.muon, counted.total - counted.muon) if job.optimizer.name == "muon" else counted.total
    device = cluster.hardware.device
    kept = device.kept_adding if adds else device.kept
    return {
        "gradients": gradients,
        "buffers": backbone.buffers + max(0.0, backbone.orthogonalised + late - activations),
        "gathered": _GLOO_THREADS * (_FLOAT if fp32 else 2) * group if gathers else 0.0,
        "kept": kept.bytes + kept.share * (gradients + activations + backbone.buffers),
    }
