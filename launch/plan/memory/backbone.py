"""Bytes per rank of the backbone's weights, gradients and optimizer state, as DeepSpeed keeps them.

A parameter's bytes, of W ranks that share it (`train/engine/zero/__init__.py` names who keeps them):

    stage  weights      gradients          master weights and state, M
    0      b            b                  M                 b: 2 in bf16, 4 in fp32
    1      b            b + 4 (bf16)       M / W             M: 4 or, in fp32 at stage 0, nothing for the master
           b            4 / W (fp32)       M / W                8 of Adam's moments, 4 of Muon's momentum
           b            4 (fp32)           M / W             where several micro-batches are added up
    2      b            4 / W              M / W
    3      b / W        4 / W              M / W

Beside them: the bucket that gradients are reduced in, at stage 3 the parameters that are gathered, and what Muon
orthogonalises at once. tests/launch/plan checks the table against tensors of real engines.
"""

from dataclasses import dataclass
from math import prod

import torch

from launch.plan.cluster import Cluster
from model.parameters import kind_of, matrices_fused
from model.transformer import LanguageModel
from train.config.job import JobConfig
from train.optim.optimizer import assign

_MOMENTS, _MOMENTUM, _FLOAT = 8, 4, 4
_ORTHOGONALISED = 1 << 27  # elements at once: train/optim/muon.py


@dataclass(frozen=True)
class Matrices:
    """The counts of a backbone's parameters that decide memory and the optimizer's time.

    Attributes:
        total: parameters.
        experts: of them, those of routed experts.
        muon, muon_experts: of both, those that Muon updates.
        largest_block: parameters of the largest block.
        newton_schulz: operations of one iteration for all of Muon's matrices.
        sizes: of every parameter that is not an expert's.
        columns: see `mean_columns`.
    """

    total: int
    experts: int
    muon: int
    muon_experts: int
    largest_block: int
    newton_schulz: float
    sizes: tuple[int, ...]
    columns: float


def count_matrices(job: JobConfig) -> Matrices:
    """Counts on the meta device."""
    with torch.device("meta"):
        network = LanguageModel(job.model)
    shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    keys = assign(job.optimizer, shapes)
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    experts = {name for name in shapes if kind_of(name).part == "routed_experts"}
    return Matrices(
        sum(sizes.values()),
        sum(sizes[name] for name in experts),
        sum(sizes[name] for name in shapes if keys[name].muon),
        sum(sizes[name] for name in experts if keys[name].muon),
        max(sum(p.numel() for p in block.parameters()) for block in network.model.layers),
        sum(_newton_schulz(name, shape) for name, shape in shapes.items() if keys[name].muon),
        tuple(sizes[name] for name in shapes if name not in experts),
        mean_columns(network),
    )


def mean_columns(network: LanguageModel) -> float:
    """The smaller side of the matrices that a token is multiplied with: their harmonic mean by operations."""
    moe, products, lost = network.config.moe, 0.0, 0.0
    for name, parameter in network.named_parameters():
        part = kind_of(name).part
        if parameter.dim() > 1 and part != "input_embedding":
            active = moe.experts_per_token / moe.num_experts if moe and part == "routed_experts" else 1.0
            products += active * parameter.numel()
            lost += active * parameter.numel() / min(parameter.shape[-2:])
    return products / lost


@dataclass(frozen=True)
class BackboneBytes:
    """Of one rank.

    Attributes:
        weights, gradients: in the forward's dtype, and what they are added up in.
        optimizer: master weights and optimizer state.
        buffers: temporary memory: buckets, gathered parameters.
        orthogonalised: what Muon needs at once, when activations are gone.
        optimizer_on_host: whether `optimizer` is in host memory.
        saved: what a save beside training copies to host memory.
    """

    weights: float
    gradients: float
    optimizer: float
    buffers: float
    orthogonalised: float
    optimizer_on_host: bool
    saved: float


def backbone_bytes(job: JobConfig, counted: Matrices, cluster: Cluster) -> BackboneBytes:
    """The table above, with experts spread by `expert_parallel` counted separately."""
    zero, expert = job.deepspeed.zero_optimization, job.deepspeed.expert_parallel
    ranks, size = cluster.ranks, expert.autoep_size if expert.enabled else 1
    adds = job.train.global_batch_size > ranks * job.train.micro_batch_size
    rest = _Part(job, counted.total - counted.experts, counted.muon - counted.muon_experts, ranks, adds)
    spread = _Part(job, counted.experts / size, counted.muon_experts / size, ranks // size, adds)
    parts = (rest, spread)
    optimizer = sum(part.optimizer for part in parts)
    width = 2 if job.train.dtype == "bf16" else _FLOAT
    # Those below the threshold are also kept whole by stage 3, beside their parts.
    whole = sum(numel for numel in counted.sizes if numel < zero.stage3_param_persistence_threshold)
    kept_whole = width * whole if zero.stage == 3 else 0
    held = sum(part.parameters for part in parts)
    saved = sum(part.state / part.ranks for part in parts)
    return BackboneBytes(
        sum(part.weights for part in parts) + kept_whole,
        sum(part.gradients for part in parts),
        optimizer,
        _buffers(job, counted, held),
        _orthogonalised(job, counted, on_gpu=not cluster.hardware.device.is_processor),
        zero.offload_optimizer.device == "cpu",
        saved,
    )


class _Part:
    """Parameters that `ranks` share, each holding `parameters` of them; `adds` says whether micro-batches add up."""

    def __init__(self, job: JobConfig, parameters: float, muon: float, ranks: int, adds: bool) -> None:
        stage, bf16 = job.deepspeed.zero_optimization.stage, job.train.dtype == "bf16"
        width = 2 if bf16 else _FLOAT
        self.parameters, self.ranks = parameters, ranks
        states = _MOMENTUM * muon + _MOMENTS * (parameters - muon)
        self.state = _FLOAT * parameters + states
        """Master weights and optimizer state of all: what is saved."""
        self.weights = width * parameters / (ranks if stage == 3 else 1)
        whole_or_part = _FLOAT if adds else _FLOAT / ranks
        self.gradients = {0: width, 1: width + _FLOAT if bf16 else whole_or_part}.get(
            stage, _FLOAT / ranks
        ) * parameters
        has_masters = stage > 0 or bf16
        self.optimizer = (self.state if has_masters else states) / (ranks if stage else 1)


def _buffers(job: JobConfig, counted: Matrices, held: float) -> float:
    zero, width = job.deepspeed.zero_optimization, 2 if job.train.dtype == "bf16" else _FLOAT
    overlapped = zero.stage == 3 if zero.overlap_comm is None else zero.overlap_comm
    total = 0.0
    if zero.stage:
        total += min(held, zero.reduce_bucket_size) * width * (2 if overlapped else 1)
    if zero.stage == 3:
        gathered = max(counted.largest_block, zero.stage3_max_live_parameters) + zero.stage3_prefetch_bucket_size
        total += min(held, gathered) * width
    return total


def _orthogonalised(job: JobConfig, counted: Matrices, *, on_gpu: bool) -> float:
    if job.optimizer.name != "muon":
        return 0.0
    # The batch, its Gram matrices and the products beside it: about four times the batch.
    of_auto = 2 if on_gpu else _FLOAT
    element = {"bf16": 2, "fp32": _FLOAT}.get(job.optimizer.newton_schulz_dtype, of_auto)
    return 4 * element * min(counted.muon, _ORTHOGONALISED)


def _newton_schulz(name: str, shape: tuple[int, ...]) -> float:
    rows, columns = shape[-2] // matrices_fused(name), shape[-1]
    few, many = sorted((rows, columns))
    return prod(shape) / (rows * columns) * (4.0 * few**2 * many + 2.0 * few**3)
