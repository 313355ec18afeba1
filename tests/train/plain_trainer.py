"""The recipe once more, in one process of plain PyTorch: what any sharded training of it must agree with.

It takes a step's whole batch at once, holds the tables as dense parameters, and knows nothing of the code that trains
for real but the network itself, the addresses of rows and their initial values. Hyperparameters come from the job's
config; what they mean is said here anew.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kernels.gather import row_index
from kernels.records.row_init import initial_rows
from model.engram import MemoryRows
from model.moe import Experts, Router
from model.transformer import LanguageModel
from offload.addresses.hashing import AddressBook
from tests.train.reference import newton_schulz
from train.config.job import JobConfig


class GlobalBatch(NamedTuple):
    """All sequences of a step."""

    tokens_BT: Tensor
    labels_BT: Tensor
    positions_BT: Tensor


class Step(NamedTuple):
    """What a step was like."""

    loss: float
    grad_norm: float


def muon_names(model: nn.Module) -> set[str]:
    """What Muon is for: weights of linear maps, except the head's, and the experts' stacks."""
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    experts = [(name, module) for name, module in model.named_modules() if isinstance(module, Experts)]
    stacks = {f"{name}.{stack}" for name, module in experts for stack, _ in module.named_parameters()}
    return (linear | stacks) - {"lm_head.weight"}


class PlainTrainer:
    """Muon and Adam on the backbone, Adam on the tables, one clip, step decay, and both kinds of balancing."""

    def __init__(self, job: JobConfig, addresses: AddressBook, batch_of: Callable[[int], GlobalBatch]) -> None:
        self.job, self.addresses, self.batch_of = job, addresses, batch_of
        assert job.model.moe is not None
        assert job.model.engram is not None
        self.moe, self.engram = job.model.moe, job.model.engram
        without_balance = self.moe.model_copy(update={"sequence_balance_factor": 0.0})
        torch.manual_seed(job.train.seed)
        self.model = LanguageModel(job.model.model_copy(update={"moe": without_balance}))
        sizes = [addresses.num_rows(module) for module in range(addresses.num_modules)]
        rows = initial_rows(
            torch.arange(sum(sizes)), self.engram.row_dim, seed=job.train.seed, std=self.engram.init_std
        )
        self.tables = [nn.Parameter(part.clone()) for part in rows.split(sizes)]
        self.inputs: dict[Router, Tensor] = {}
        for module in self.model.modules():
            if isinstance(module, Router):
                module.register_forward_hook(lambda router, args, _: self.inputs.update({router: args[0]}))

        names = muon_names(self.model)
        self.matrices = {name: p for name, p in self.model.named_parameters() if name in names}
        self.momenta = {name: torch.zeros_like(p) for name, p in self.matrices.items()}
        others = [p for name, p in self.model.named_parameters() if name not in names]
        config = job.optimizer
        self.adam = torch.optim.AdamW(
            [
                {"params": [p for p in others if p.dim() > 1], "weight_decay": config.weight_decay},
                {"params": [p for p in others if p.dim() == 1], "weight_decay": 0.0},
            ],
            betas=(config.beta1, config.beta2),
            eps=config.eps,
        )
        rule = job.offload.optimizer
        self.table_adam = torch.optim.Adam(self.tables, betas=(rule.beta1, rule.beta2), eps=rule.eps)

    def fit(self) -> Iterator[Step]:
        """All steps of the job."""
        for number in range(self.job.train.steps):
            loss = self._backward(self.batch_of(number))
            grad_norm = self._clip()
            self._update(self.lr_factor(number))
            self._move_biases()
            yield Step(loss, grad_norm)

    def lr_factor(self, number: int) -> float:
        """Linear warm-up; 0.316 of the peak after 80 % of the steps, 0.1 after 90 %."""
        warmup, done = self.job.schedule.warmup_steps, number / self.job.train.steps
        if number < warmup:
            return (number + 1) / warmup
        return 1.0 if done < 0.8 else 0.316 if done < 0.9 else 0.1

    def _backward(self, batch: GlobalBatch) -> float:
        for parameter in (*self.model.parameters(), *self.tables):
            parameter.grad = None
        rows = self.addresses.all_rows(batch.tokens_BT, batch.positions_BT)
        memory = [MemoryRows(t, row_index(index, len(t))) for t, index in zip(self.tables, rows, strict=True)]
        logits = self.model(batch.tokens_BT, batch.positions_BT, memory)
        labelled = batch.labels_BT >= 0
        losses = -logits.log_softmax(-1).gather(-1, batch.labels_BT.clamp_min(0).unsqueeze(-1)).squeeze(-1)
        loss = losses[labelled].sum() / labelled.sum()
        weights = labelled.sum(dim=1) / labelled.sum()
        (loss + self.moe.sequence_balance_factor * (self._sequence_balance(len(weights)) * weights).sum()).backward()
        return loss.item()

    def _scores(self) -> Iterator[tuple[Router, Tensor, Tensor]]:
        """Of each router: scores of all tokens, and a 1 for each expert that a token chose."""
        for router, tokens in self.inputs.items():
            scores = torch.sigmoid(tokens @ router.weight.T)
            ranks = (scores + router.e_score_correction_bias).argsort(dim=-1, descending=True).argsort(dim=-1)
            yield router, scores, (ranks < self.moe.experts_per_token).float()

    def _sequence_balance(self, sequences: int) -> Tensor:
        total = torch.zeros(sequences)
        for _, scores, chosen in self._scores():
            share = (scores / scores.sum(-1, keepdim=True)).view(sequences, -1, self.moe.num_experts).mean(1)
            load = chosen.view(sequences, -1, self.moe.num_experts).mean(1)
            total = total + (load * share).sum(-1) * self.moe.num_experts / self.moe.experts_per_token
        return total

    def _clip(self) -> float:
        gradients = [p.grad for p in (*self.model.parameters(), *self.tables) if p.grad is not None]
        norm = float(sum(g.double().square().sum() for g in gradients)) ** 0.5
        limit = self.job.train.gradient_clipping
        for gradient in gradients if limit is not None and norm > limit else ():
            gradient.mul_(limit / norm)
        return norm

    @torch.no_grad()
    def _update(self, lr_factor: float) -> None:
        self._chosen = [(router, chosen.sum(0)) for router, _, chosen in self._scores()]
        config = self.job.optimizer
        lr = config.learning_rate * lr_factor
        for optimizer, times in ((self.adam, 1.0), (self.table_adam, self.job.offload.optimizer.lr_factor)):
            for group in optimizer.param_groups:
                group["lr"] = lr * times
            optimizer.step()
        lr = (config.muon_learning_rate or config.learning_rate) * lr_factor
        for name, p in self.matrices.items():
            assert p.grad is not None
            momentum = self.momenta[name].mul_(config.momentum).add_((1 - config.momentum) * p.grad)
            update = (1 - config.momentum) * p.grad + config.momentum * momentum
            p.mul_(1 - lr * config.weight_decay).sub_(lr * config.muon_update_rms * orthogonal(name, update))

    @torch.no_grad()
    def _move_biases(self) -> None:
        for router, counts in self._chosen:
            router.e_score_correction_bias += self.moe.balance_rate * torch.sign(counts.mean() - counts)


def orthogonal(name: str, update: Tensor) -> Tensor:
    """Matrix by matrix; each expert's gate and up projection are two."""
    if update.dim() == 3:
        return torch.stack([orthogonal(name, one) for one in update])
    if name.endswith("gate_up_proj"):
        return torch.cat([orthogonal("", half) for half in update.chunk(2)])
    return newton_schulz(update) * max(update.shape) ** 0.5 if update.any() else update
