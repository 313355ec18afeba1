"""The loss against PyTorch's on whole logits, and what it keeps in memory."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from model.loss import IGNORED, linear_cross_entropy


def _inputs(tokens: int, width: int, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(tokens, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight_VD = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels_N = torch.randint(vocabulary, (tokens,), generator=generator)
    labels_N[::3] = IGNORED
    return hidden_ND, weight_VD, labels_N


def _plain(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    logits_NV = F.linear(hidden_ND, weight_VD)
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    return F.cross_entropy(logits_NV, labels_N, ignore_index=IGNORED, reduction="sum")


@pytest.mark.parametrize("chunk", [1, 7, 20, 64, None])
def test_equals_the_loss_of_whole_logits(chunk: int | None) -> None:
    inputs = _inputs(20, 8, 50, torch.float64)
    found, expected = linear_cross_entropy(*inputs, chunk), _plain(*inputs)
    torch.testing.assert_close(found, expected)
    for a, b in zip(
        torch.autograd.grad(found * 0.3, inputs[:2]), torch.autograd.grad(expected * 0.3, inputs[:2]), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_gradients_in_bf16_are_as_near_as_those_of_whole_logits() -> None:
    inputs = _inputs(600, 16, 300, torch.bfloat16)
    exact = _inputs(600, 16, 300, torch.bfloat16)
    exact = (exact[0].detach().double().requires_grad_(), exact[1].detach().double().requires_grad_(), exact[2])
    right = torch.autograd.grad(_plain(*exact), exact[:2])
    plain = torch.autograd.grad(_plain(*inputs), inputs[:2])
    found = linear_cross_entropy(*inputs, 32)
    assert found.dtype == torch.float32
    for ours, theirs, exactly in zip(torch.autograd.grad(found, inputs[:2]), plain, right, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours - exactly).norm() <= 1.1 * (theirs - exactly).norm()


@pytest.mark.parametrize("trains", [True, False])
def test_one_chunks_logits_are_in_memory_at_a_time(trains: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    before: list[weakref.ref[Tensor]] = []
    product = F.linear

    def counted(*arguments: Tensor) -> Tensor:
        assert not any(logits() is not None for logits in before), "an earlier chunk's are still there"
        before.append(weakref.ref(found := product(*arguments)))
        return found

    monkeypatch.setattr(F, "linear", counted)
    with torch.set_grad_enabled(trains):
        linear_cross_entropy(*_inputs(20, 8, 50, torch.float32), 6)
    assert len(before) == 4


def test_a_frozen_head_and_evaluation_compute_no_gradients_for_it() -> None:
    hidden_ND, weight_VD, labels_N = _inputs(20, 8, 50, torch.float64)
    with torch.no_grad():
        expected = _plain(hidden_ND, weight_VD, labels_N)
        with FlopCounterMode(display=False) as products:
            torch.testing.assert_close(linear_cross_entropy(hidden_ND, weight_VD, labels_N, 6), expected)
    assert products.get_total_flops() == 2 * 20 * 8 * 50, "evaluation computed more than logits"
    weight_VD.requires_grad_(False)
    linear_cross_entropy(hidden_ND, weight_VD, labels_N, 6).backward()
    expected = torch.autograd.grad(_plain(hidden_ND, weight_VD, labels_N), hidden_ND)[0]
    torch.testing.assert_close(hidden_ND.grad, expected)
    assert weight_VD.grad is None


@pytest.mark.parametrize("label", [50, -1, -99])
def test_a_label_outside_the_vocabulary_is_told(label: int) -> None:
    hidden_ND, weight_VD, labels_N = _inputs(20, 8, 50, torch.float64)
    labels_N[7] = label
    with pytest.raises(RuntimeError, match=rf"index {label} is out of bounds"):
        linear_cross_entropy(hidden_ND, weight_VD, labels_N, 6)


class _Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Elements of the largest tensor that an operator makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize("grad", [True, False])
def test_no_logits_of_the_batch_are_made_and_none_are_kept(grad: bool) -> None:
    """512 tokens x 129,280 entries would be 66M logits."""
    hidden_ND, labels_N = torch.randn(512, 4, requires_grad=True), torch.randint(129_280, (512,))
    weight_VD = torch.randn(129_280, 4, requires_grad=True)
    kept = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.nbytes)
        return tensor

    with (
        torch.set_grad_enabled(grad),
        _Largest() as largest,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        linear_cross_entropy(hidden_ND, weight_VD, labels_N)
    assert largest.elements <= 128 * 129_280
    assert sum(kept) == (4 * (hidden_ND.numel() + weight_VD.numel()) if grad else 0)
