"""The mixture against a loop over tokens; idle experts; counts; what keeps fp32."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import MoEConfig
from model.moe import Experts, MoE
from model.router_logits import router_logits
from tests.model.tiny import MOE


def _moe(config: MoEConfig = MOE, dtype: torch.dtype = torch.float64) -> MoE:
    torch.manual_seed(0)
    moe = MoE(config, 12, std=0.3, output_std=0.3).to(dtype)
    moe.gate.e_score_correction_bias.normal_(std=0.2)
    return moe


def _hidden(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 9, 12, dtype=dtype, generator=torch.Generator().manual_seed(1))


def _token_by_token(moe: MoE, config: MoEConfig, hidden: Tensor) -> Tensor:
    rows = []
    for token in hidden.flatten(0, 1):
        scores = torch.sigmoid(moe.gate.weight @ token)
        ranked = sorted(range(config.num_experts), key=lambda e: -(scores[e] + moe.gate.e_score_correction_bias[e]))
        chosen = ranked[: config.experts_per_token]
        total = sum(scores[e] for e in chosen) if config.norm_topk else 1.0
        result = torch.zeros_like(token)
        for e in chosen:
            gate, up = (moe.experts.gate_up_proj[e] @ token).chunk(2)
            weight = config.routed_scaling_factor * scores[e] / total
            result = result + weight * (moe.experts.down_proj[e] @ (F.silu(gate) * up))
        if moe.shared_experts is not None:
            shared = moe.shared_experts
            inner = F.silu(shared.gate_proj.weight @ token) * (shared.up_proj.weight @ token)
            result = result + shared.down_proj.weight @ inner
        rows.append(result)
    return torch.stack(rows).view_as(hidden)


@pytest.mark.parametrize("norm_topk", [True, False])
@pytest.mark.parametrize("shared_experts", [0, 2])
def test_equals_token_by_token_with_gradients(norm_topk: bool, shared_experts: int) -> None:
    config = MOE.model_copy(update={"norm_topk": norm_topk, "shared_experts": shared_experts})
    moe = _moe(config)
    hidden = _hidden().requires_grad_()
    upstream = torch.randn(hidden.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    actual, expected = moe(hidden), _token_by_token(moe, config, hidden)
    torch.testing.assert_close(actual, expected)
    leaves = [hidden, *moe.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(actual, leaves, upstream), torch.autograd.grad(expected, leaves, upstream)
    )


def test_idle_experts_work_and_get_zero_gradients() -> None:
    moe = _moe()
    moe.gate.e_score_correction_bias.copy_(torch.tensor([0.0, 9.0, 9.0, 0.0, 0.0, 0.0]))
    moe(_hidden()).sum().backward()
    assert moe.tokens_per_expert.tolist() == [0, 18, 18, 0, 0, 0]
    for weight in moe.experts.parameters():
        assert weight.grad is not None
        assert [bool(part.any()) for part in weight.grad] == [False, True, True, False, False, False]


def test_counts_accumulate_in_training_mode_only() -> None:
    moe = _moe()
    moe.eval()(_hidden())
    assert moe.tokens_per_expert.sum() == 0
    moe.train()(_hidden())
    once = moe.tokens_per_expert.clone()
    moe(_hidden())
    assert once.sum() == 2 * 9 * MOE.experts_per_token
    assert torch.equal(moe.tokens_per_expert, 2 * once)
    assert "tokens_per_expert" not in moe.state_dict()


def test_the_bias_chooses_but_does_not_weigh() -> None:
    config = MOE.model_copy(update={"experts_per_token": 6, "norm_topk": False})
    moe = _moe(config)
    before = moe(_hidden())
    moe.gate.e_score_correction_bias.normal_(std=5.0)
    torch.testing.assert_close(moe(_hidden()), before)


def test_bias_and_counts_stay_fp32_under_a_cast() -> None:
    moe = _moe(dtype=torch.float32)
    moe.gate.e_score_correction_bias.fill_(1 + 2**-12)
    moe.tokens_per_expert.fill_(257)
    moe.to(torch.bfloat16)
    assert moe.gate.weight.dtype == moe.experts.down_proj.dtype == torch.bfloat16
    assert (moe.gate.e_score_correction_bias == 1 + 2**-12).all()
    assert (moe.tokens_per_expert == 257).all()


def test_experts_are_chosen_by_logits_in_fp32_of_a_bf16_model() -> None:
    """Two experts whose logits bf16 rounds to the same number: the better one is the second."""
    config = MOE.model_copy(update={"num_experts": 2, "experts_per_token": 1})
    gate = MoE(config, 12, std=0.3, output_std=0.3).to(torch.bfloat16).gate
    with torch.no_grad():
        gate.weight.copy_(torch.tensor([[1.0] * 12, [1.0] * 11 + [1.0 + 2**-7]]))
    token = torch.ones(1, 12, dtype=torch.bfloat16)
    assert len(F.linear(token, gate.weight).unique()) == 1
    weights, experts, scores = gate(token)
    assert experts.tolist() == [[1]]
    assert weights.dtype == scores.dtype == torch.float32
    assert torch.equal(scores, torch.sigmoid(torch.tensor([[12.0, 12.0 + 2**-7]])))


def test_gradients_of_widened_logits_are_autograds_with_no_wide_copy_of_the_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, weight = (torch.randn(n, 12, generator=generator).bfloat16().requires_grad_() for n in (9, 6))
    upstream = torch.randn(9, 6, generator=generator)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        logits = router_logits(tokens, weight)
    assert {tensor.data_ptr() for tensor in kept} == {tokens.data_ptr(), weight.data_ptr()}
    expected = F.linear(tokens.float(), weight.float())
    assert torch.equal(logits, expected)
    for found, wanted in zip(
        *(torch.autograd.grad(o, [tokens, weight], upstream) for o in (logits, expected)), strict=True
    ):
        assert torch.equal(found, wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_grouped_product_equals_the_loop_on_a_gpu() -> None:
    torch.manual_seed(0)
    narrow = Experts(MOE, 24, std=0.3, output_std=0.3).to("cuda", torch.bfloat16)
    wide = Experts(MOE, 24, std=0.3, output_std=0.3).to("cuda", torch.float32)  # not bf16: the loop
    wide.load_state_dict(narrow.state_dict())
    ends = torch.tensor([5, 5, 18, 19, 30, 37], dtype=torch.int32, device="cuda")  # unaligned, one empty
    rows = torch.randn(37, 24, device="cuda", dtype=torch.bfloat16)
    results = []
    for experts, dtype in ((narrow, torch.bfloat16), (wide, torch.float32)):
        leaf = rows.to(dtype).requires_grad_()
        out = experts(leaf, ends)
        results.append([out, *torch.autograd.grad(out.sum(), [leaf, *experts.parameters()])])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual.float(), expected, rtol=0.05, atol=0.02 * expected.abs().max().item())
