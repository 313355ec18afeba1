"""A small model with everything an engine can trip over, and a plain trainer of one process to compare engines with."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from train.optim.optimizer import OptimizerConfig, assign

VOCABULARY, WIDTH, ROWS = 17, 6, 5
ACCUMULATION = 2
CLIP = 0.5


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 8, WIDTH) * 0.3)
        self.down_proj = nn.Parameter(torch.randn(3, WIDTH, 4) * 0.3)

    def forward(self, x):
        gate, up = torch.einsum("btd,efd->btef", x, self.gate_up_proj).chunk(2, dim=-1)
        return torch.einsum("btef,edf->bted", F.silu(gate) * up, self.down_proj)


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(WIDTH, 3, bias=False)
        self.experts = Experts()

    def forward(self, x):
        return x + (self.experts(x) * torch.softmax(self.gate(x), dim=-1).unsqueeze(-1)).sum(dim=-2)


class Toy(nn.Module):
    """Odd sizes, so that partitions cut matrices; stacked experts; rows as autograd leaves; parameters nobody uses."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH + 1)
        self.back = nn.Linear(WIDTH + 1, WIDTH, bias=False)
        self.mlp = Mlp()
        self.unused_matrix = nn.Parameter(torch.randn(3, 2))
        self.unused_vector = nn.Parameter(torch.randn(3))
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.register_buffer("calls", torch.zeros(2))

    def forward(self, tokens, labels, memory: tuple[Tensor, Tensor]):
        self.calls += 1
        rows, index = memory
        x = self.embed_tokens(tokens) + rows[index].to(self.proj.weight.dtype)
        x = self.mlp(x + self.back(torch.tanh(self.proj(x))))
        return F.cross_entropy(self.lm_head(x).float().flatten(0, 1), labels.flatten())


def micro_batch(step: int, number: int, rank: int) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Tokens, labels and memory rows of a micro-batch; the rows are the same at every rank of a step."""
    generator = torch.Generator().manual_seed(1000 * step + 10 * number + rank)
    tokens, labels = torch.randint(0, VOCABULARY, (2, 3, 4), generator=generator)
    index = torch.randint(0, ROWS, (3, 4), generator=generator)
    rows = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(step))
    return tokens, labels, (rows, index)


def newton_schulz(gradient: Tensor, steps: int = 5) -> Tensor:
    """One matrix, step by step."""
    x = gradient / gradient.norm()
    for _ in range(steps):
        if x.shape[0] > x.shape[1]:
            x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
        else:
            a = x @ x.T
            x = 3.4445 * x - 4.7750 * a @ x + 2.0315 * a @ a @ x
    return x


class PlainTrainer:
    """fp32 masters, the batches of all ranks one after the other, torch's AdamW, Muon matrix by matrix."""

    def __init__(self, model: nn.Module, config: OptimizerConfig, world_size: int, dtype: torch.dtype):
        self.model, self.config, self.world_size, self.dtype = model, config, world_size, dtype
        self.masters = {name: p.detach().to(dtype).float().clone() for name, p in model.named_parameters()}
        self.keys = assign(config, {name: tuple(p.shape) for name, p in self.masters.items()})
        self.momenta = {name: torch.zeros_like(p) for name, p in self.masters.items()}
        adam = {decay: [p for n, p in self.masters.items() if not self.keys[n].muon and self.keys[n].decay == decay]
                for decay in (True, False)}  # fmt: skip
        groups = [{"params": params, "weight_decay": config.weight_decay * decay} for decay, params in adam.items()]
        self.adam = torch.optim.AdamW(
            [g for g in groups if g["params"]], config.learning_rate, (config.beta1, config.beta2), config.eps
        )
        self.row_gradients: list[Tensor] = []

    def step(self, batch_of: Callable, lr_factor: float) -> float:
        """One step on `batch_of(number, rank)`; returns the squared norm of the raw gradient."""
        low = {name: p.to(self.dtype).requires_grad_() for name, p in self.masters.items()}
        total = {name: torch.zeros_like(p) for name, p in self.masters.items()}
        self.row_gradients = []
        for rank in range(self.world_size):
            leaf = batch_of(0, rank)[2][0].requires_grad_()
            for number in range(ACCUMULATION):
                tokens, labels, (_, index) = batch_of(number, rank)
                loss = functional_call(self.model, low, (tokens, labels, (leaf, index))) / ACCUMULATION
                gradients = torch.autograd.grad(loss, [*low.values(), leaf], allow_unused=True)
                leaf.grad = gradients[-1] if leaf.grad is None else leaf.grad + gradients[-1]
                for name, gradient in zip(low, gradients[:-1], strict=True):
                    if gradient is not None:
                        total[name] += gradient.float() / self.world_size
            self.row_gradients.append(leaf.grad)
        norm_squared = sum(g.double().square().sum().item() for g in total.values())
        scale = min(1.0, CLIP / math.sqrt(norm_squared))
        for name, p in self.masters.items():
            p.grad = total[name] * scale
        for group in self.adam.param_groups:
            group["lr"] = self.config.learning_rate * lr_factor
        self.adam.step()
        self._muon(lr_factor)
        return norm_squared

    @torch.no_grad()
    def _muon(self, lr_factor: float) -> None:
        lr = (self.config.muon_learning_rate or self.config.learning_rate) * lr_factor
        for name in (name for name, key in self.keys.items() if key.muon):
            p, m, momentum = self.masters[name], self.momenta[name], self.config.momentum
            m.mul_(momentum).add_(p.grad * (1 - momentum))
            update = p.grad * (1 - momentum) + m * momentum
            matrices = update.reshape(-1, *((2, 4, WIDTH) if "gate_up" in name else p.shape[-2:])).flatten(0, -3)
            matrices = [
                newton_schulz(u) * self.config.muon_update_rms * max(u.shape) ** 0.5 if u.any() else u for u in matrices
            ]
            p.mul_(1 - lr * self.config.weight_decay).sub_(torch.stack(matrices).reshape(p.shape) * lr)
