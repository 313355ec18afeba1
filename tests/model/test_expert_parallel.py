"""What `model.moe` relies on in DeepSpeed's AutoEP, on two ranks that hold half of the experts each.

The reference is our own forward, trained beside it with plain data parallelism and torch's AdamW.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from model.balance import update_balance
from model.transformer import LanguageModel
from tests.distributed import run_ranks
from tests.model.tiny import memories, positions, random_tokens, tiny_model

RANKS, STEPS, RATE = 2, 4, 1e-2
ADAM = {"lr": 1e-2, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.1}
CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 0.0,
    "zero_optimization": {"stage": 1},
    "optimizer": {"type": "AdamW", "params": {**ADAM, "torch_adam": True}},
    "expert_parallel": {"enabled": True, "autoep_size": RANKS, "preset_model": "deepseek_v3"},
}


class Outcome(NamedTuple):
    """What one rank saw of one way of training."""

    logits: Tensor
    losses: list[float]
    counts: list[Tensor]  # of every step, summed over the ranks
    weights: dict[str, Tensor]
    biases: list[Tensor]
    rows_gradient: Tensor


def _train(model: LanguageModel, step: Any, weights: Any) -> Outcome:
    rank = dist.get_rank()
    tokens, place = random_tokens(2, 16, seed=10 + rank), positions(10, 6, batch=2)
    memory = memories(model, 2, 16)
    with torch.no_grad():
        logits = model.eval()(tokens, place, memory)
    model.train()
    update_balance(model, 0.0, dist.all_reduce)
    losses, counts = [], []
    for _ in range(STEPS):
        for table in memory:
            table.rows_UD.grad = None
        loss = model(tokens, place, memory, tokens) / tokens.numel()
        step(loss)
        losses.append(loss.item())
        counts.append(update_balance(model, RATE, dist.all_reduce))
    biases = [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
    assert memory[0].rows_UD.grad is not None
    return Outcome(logits, losses, counts, weights(model), biases, memory[0].rows_UD.grad)


def _own() -> Outcome:
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), **ADAM)

    def step(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= RANKS
        optimizer.step()

    return _train(model, step, lambda model: dict(model.named_parameters()))


def _auto_ep() -> Outcome:
    import deepspeed

    import train.engine.auto_ep  # noqa: F401  # what our balance asks of its layers

    model = tiny_model()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=CONFIG)

    def step(loss: Tensor) -> None:
        engine.backward(loss)
        engine.step()

    return _train(model, step, _as_ours)


def _as_ours(model: LanguageModel) -> dict[str, Tensor]:
    """The whole model under our names and shapes, by the table in `train.engine.auto_ep`."""
    whole = {}
    for name, parameter in model.named_parameters():
        if ".mlp.experts." in name:
            shards = [torch.empty_like(parameter) for _ in range(RANKS)]
            dist.all_gather(shards, parameter.detach().contiguous())
            whole[name] = torch.cat(shards)
        else:
            whole[name.replace(".router.gate.", ".gate.")] = parameter
    for prefix in [name.removesuffix("w1") for name in whole if name.endswith(".experts.w1")]:
        whole[prefix + "gate_up_proj"] = torch.cat((whole.pop(prefix + "w1"), whole.pop(prefix + "w3")), dim=1)
        whole[prefix + "down_proj"] = whole.pop(prefix + "w2")
    return whole


def _in_bf16() -> Any:
    """A bf16 model whose buffers, too, DeepSpeed is told to cast."""
    import deepspeed

    config = {**CONFIG, "bf16": {"enabled": True}, "data_types": {"buffer_dtype": "bf16"}}
    engine, *_ = deepspeed.initialize(model=tiny_model(), config=config)
    return engine.module


def _chosen_in_bf16(auto_ep: Any) -> None:
    """Every router's weights, experts and scores have the same bits, in fp32, with expert parallelism as without."""
    hidden = torch.randn(2, 512, 16, generator=torch.Generator().manual_seed(3)).bfloat16()
    for ours, theirs in zip(tiny_model(torch.bfloat16).model.layers[1:], auto_ep.model.layers[1:], strict=True):
        assert theirs.mlp.router.gate.weight.dtype == torch.bfloat16
        weights, experts, scores = ours.mlp.gate(hidden.flatten(0, 1))
        their_weights, their_experts, _ = theirs.mlp.router(hidden.flatten(0, 1))
        assert torch.equal(their_experts, experts)
        assert torch.equal(their_weights, weights)
        assert torch.equal(theirs.mlp.scores(hidden).flatten(0, 1), scores)


def _rank() -> None:
    own, auto_ep = _own(), _auto_ep()
    torch.testing.assert_close(auto_ep.logits, own.logits)
    torch.testing.assert_close(auto_ep.losses, own.losses, rtol=1.3e-6, atol=1e-5)  # as of fp32 numbers
    assert own.losses[-1] < own.losses[0]
    assert all(torch.equal(a, b) for a, b in zip(auto_ep.counts, own.counts, strict=True))
    assert all((counts.sum(dim=1) == RANKS * 2 * 16 * 2).all() for counts in own.counts)
    assert len(own.biases) == len(auto_ep.biases) == 2
    assert all(torch.equal(a, b) for a, b in zip(auto_ep.biases, own.biases, strict=True))
    torch.testing.assert_close(auto_ep.rows_gradient, own.rows_gradient)
    torch.testing.assert_close(auto_ep.weights, own.weights, rtol=1e-3, atol=1e-4)
    in_bf16 = _in_bf16()
    _chosen_in_bf16(in_bf16)
    assert sorted(name for name, buffer in in_bf16.named_buffers() if buffer.dtype == torch.float32) == [
        f"model.layers.{layer}.mlp.{name}"
        for layer in (1, 2)
        for name in ("router.e_score_correction_bias", "tokens_per_expert")
    ]


def test_auto_ep_computes_trains_and_counts_as_our_own_forward() -> None:
    run_ranks(_rank, RANKS)
