"""The training engine: forward, backward, the raw gradient's norm, a step or none, and the state for checkpoints.

Gradient scale: a step's gradient is the *sum* over the micro-batches and the *mean* over the ranks of the gradients
of the losses given to `backward`. Nothing else is scaled: scale the losses so that this mean is what you want.
Autograd leaves passed to the forward receive their gradients as they are: this rank's, neither averaged nor clipped.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from train.config.deepspeed import DeepSpeedConfig
from train.engine.auto_ep import LogicalNames
from train.engine.groups import describe_flat_parts, optimizer_groups, parameters_of
from train.engine.setup import deepspeed
from train.engine.state import LogicalState
from train.engine.zero import wrap
from train.engine.zero.wrapper import full_shape
from train.optim.backbone import BackboneOptimizer
from train.optim.flat_parts import check_complete, gather_layout, owned_runs
from train.optim.optimizer import OptimizerConfig, assign
from train.optim.pieces import SavedState, StatePiece, TensorInfo


class Engine:
    """Trains a model under DeepSpeed.

    Example:
        >>> for batch in batches:  # `accumulation_steps` of them
        ...     engine.backward(engine(batch.tokens_BT, batch.positions_BT, labels_BT=batch.labels_BT) * scale)
        >>> norm_squared = engine.gradient_norm_squared().item()
        >>> if math.isfinite(norm_squared):
        ...     engine.step(lr_factor=1.0, gradient_scale=clip_scale(norm_squared, 1.0))
        ... else:
        ...     engine.skip_step()
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: OptimizerConfig,
        deepspeed_config: DeepSpeedConfig,
        dtype: Literal["bf16", "fp32"] = "fp32",
        accumulation_steps: int = 1,
        gathered_whole: type[nn.Module] | None = None,
    ) -> None:
        """Takes over `model`, the same on all ranks; torch.distributed must be initialised. Collective.

        Args:
            model: parameters in fp32.
            optimizer: optimizer of all its parameters.
            deepspeed_config: the `deepspeed` section.
            dtype: dtype of the parameters in the forward; master weights and optimizer state are fp32.
            accumulation_steps: `backward` calls that a step consists of.
            gathered_whole: modules of this class have their parameters gathered together by ZeRO 3, whose hooks are
                then around them and not within; None leaves every submodule its own.

        Raises:
            UserError: the world size or the model does not fit the `deepspeed` section.
        """
        world_size = dist.get_world_size()
        deepspeed_config.check(world_size, getattr(getattr(model, "config", None), "n_routed_experts", None))
        shapes = {name: full_shape(parameter) for name, parameter in model.named_parameters()}
        self.accumulation_steps = accumulation_steps
        self.steps = 0
        """Steps applied so far."""
        self._micro_batch = 0
        self._assignment = assign(optimizer, shapes)
        if gathered_whole is not None:
            deepspeed.utils.set_z3_leaf_modules(model, [gathered_whole])
        self._engine, wrapped, _, _ = deepspeed.initialize(
            model=model,
            optimizer=lambda _: self._build_optimizer(model, optimizer),
            config=deepspeed_config.build(dtype, accumulation_steps, world_size, sum(map(math.prod, shapes.values()))),
        )
        self._wrapper = wrap(wrapped)
        self._wrapper.trust_gradients()
        self._finite: bool | None = None  # whether the step's gradient is, once its norm is known
        self._names = LogicalNames(self.module)
        self._parts, muon = describe_flat_parts(self.module, self._names, self._wrapper)
        layout = gather_layout(self._parts)
        check_complete(layout, shapes)
        self.muon_parameters = parameters_of(layout, muon)
        """Logical names of the parameters that Muon updates; Adam updates the others."""
        if self.muon_parameters != {name for name, key in self._assignment.items() if key.muon}:
            raise RuntimeError("DeepSpeed regrouped the parameters: Muon would not update those that it should")
        self._optimizer.bind(self._parts, muon, layout, self.device)
        self._state = LogicalState(self._parts, layout, owned_runs(layout), self._optimizer, self._buffers)

    @property
    def module(self) -> nn.Module:
        """The model; with expert parallelism its mixture-of-experts layers are DeepSpeed's."""
        return self._engine.module

    @property
    def device(self) -> torch.device:
        """Where inputs of the forward belong."""
        return torch.device(deepspeed.get_accelerator().current_device_name())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward."""
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of a scalar `loss`. With the last micro-batch of a step, ranks reduce them. Collective.

        Raises RuntimeError for more calls than `accumulation_steps` without a step between.
        """
        self._micro_batch += 1
        if self._micro_batch > self.accumulation_steps:
            raise RuntimeError(f"backward was called more than {self.accumulation_steps} times before a step")
        self._engine.set_gradient_accumulation_boundary(self._micro_batch == self.accumulation_steps)
        self._engine.backward(loss, scale_wrt_gas=False)

    @torch.no_grad()
    def gradient_norm_squared(self) -> Tensor:
        """Squared L2 norm of the step's raw gradient over all parameters, experts of all ranks included. Collective.

        To be called after the last `backward`. Returns an fp64 scalar on the CPU with the same bits on every rank;
        inf or nan if any gradient is.
        """
        self._require_all_micro_batches()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for part, gradients in zip(self._parts, self._wrapper.gradients(), strict=True):
            copies = dist.get_world_size(part.group) if part.replicated else 1
            for gradient in gradients:
                norm = torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32).to(self.device)
                total += norm.double().square() / copies
        by_rank = torch.empty(dist.get_world_size(), dtype=torch.float64, device=self.device)
        dist.all_gather_into_tensor(by_rank, total.unsqueeze(0))
        norm_squared = by_rank.cpu().sum()
        self._finite = math.isfinite(norm_squared.item())
        return norm_squared

    def step(self, *, lr_factor: float, gradient_scale: float = 1.0) -> None:
        """Updates the parameters with `gradient_scale` times the raw gradient. Collective.

        Args:
            lr_factor: factor on the peak learning rates.
            gradient_scale: from the clip; acts before Adam's and Muon's moments see the gradient.

        Raises RuntimeError if a backward is missing, or gradients are not finite: nothing has changed then; continue
        with `skip_step`.
        """
        self._require_all_micro_batches()
        if self._finite is None:
            self.gradient_norm_squared()
        if not self._finite:
            raise RuntimeError("the step's gradients are not finite: it can only be skipped")
        self._optimizer.set_lr_factor(lr_factor)
        with self._optimizer.updating(gradient_scale):
            self._end_step()
        self.steps += 1

    def skip_step(self) -> None:
        """Drops the step's gradients; weights, optimizer state and `steps` keep their bits. Collective."""
        self._require_all_micro_batches()
        self._end_step()

    def _end_step(self) -> None:
        try:
            self._engine.step()
        finally:
            self._finite, self._micro_batch = None, 0

    def _require_all_micro_batches(self) -> None:
        if self._micro_batch != self.accumulation_steps:
            raise RuntimeError(f"{self._micro_batch} of {self.accumulation_steps} micro-batches were given to backward")

    def state_tensors(self) -> dict[str, TensorInfo]:
        """The tensors of the state, weights and optimizer, by name: the same on all ranks, whatever their number."""
        return self._state.tensors()

    def state_pieces(self, piece_bytes: int) -> Iterator[StatePiece]:
        """This rank's part of the state, in pieces up to a size; all ranks' parts together have each element once.

        They are views of the live state, on its device.
        """
        return self._state.pieces(piece_bytes)

    def check_state(self, saved: SavedState) -> None:
        """Raises ValueError, on all ranks alike, if `saved` lacks a tensor, or has one of another shape."""
        self._state.check(saved)

    def load_state(self, saved: SavedState) -> None:
        """Loads this rank's part of `saved`, which `check_state` let pass; `publish_state` has to follow.

        The number of ranks, the ZeRO stage and expert parallelism may differ from when the state was saved. What
        `saved.pieces` raises is passed on: this rank's state is then a mixture, until another one is loaded.
        """
        self._state.load(saved)
        self.steps = saved.steps

    def publish_state(self) -> None:
        """Makes what `load_state` loaded on all ranks the weights of the forward. Collective."""
        self._wrapper.publish()

    def close(self) -> None:
        """Releases DeepSpeed's hooks on the model."""
        self._engine.destroy()

    def _build_optimizer(self, model: nn.Module, config: OptimizerConfig) -> BackboneOptimizer:
        """Called by DeepSpeed once it has replaced the experts' layers, so groups are made of what exists then."""
        self._optimizer = BackboneOptimizer(optimizer_groups(model, config, self._assignment), config)
        return self._optimizer

    def _buffers(self) -> dict[str, Tensor]:
        parameters = {name for name, _ in self.module.named_parameters(remove_duplicate=False)}
        persistent = self.module.state_dict().keys() - parameters
        return {self._names.name(name): self.module.get_buffer(name) for name in sorted(persistent)}
