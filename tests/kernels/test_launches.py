"""The counter of launches counts what it says."""

import torch

from kernels.branches.sinkhorn import sinkhorn
from kernels.gate import engram_gate
from tests.kernels.launches import on_a_gpu


def test_operations_are_counted_and_neither_views_nor_new_memory() -> None:
    with on_a_gpu() as counted:
        torch.empty(4, 4).view(2, 8).T.add_(1).sum()
    assert counted == {"aten::add_": 1, "aten::sum": 1}


def test_a_kernel_is_counted_as_often_as_it_is_launched() -> None:
    logits = torch.randn(3, 4, 4, requires_grad=True)
    with on_a_gpu() as counted:
        matrices = sinkhorn(logits, 20)
        assert counted == {"triton::_forward_kernel": 1}
        torch.autograd.backward(matrices, torch.ones(3, 4, 4))
    assert counted["triton::_backward_kernel"] == 1


def test_what_an_operation_of_our_own_does_beside_its_kernels_is_counted() -> None:
    tensor, weights = torch.randn(2, 3, 4, 16), torch.ones(4, 16)
    with on_a_gpu() as counted:
        engram_gate(tensor, tensor, tensor[:, :, 0], weights, weights, eps=1e-6, signed_sqrt=True)
    assert counted == {"triton::_gate_forward_kernel": 1, "aten::mul": 1}
