"""The Engram module against explicit loops; the convolution's reach and its start as the identity."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import EngramConfig
from model.engram import Engram, MemoryRows
from tests.model.tiny import ENGRAM, positions, random_memory

WIDTH = 10
PLACE = positions(11, 5, batch=2)  # the first document is longer than the convolution's reach of 9


def _engram(branches: int, **changes: Any) -> Engram:
    torch.manual_seed(0)
    config = ENGRAM.model_copy(update=changes)
    engram = Engram(config, WIDTH, branches=branches, norm_eps=1e-6, std=0.3).double()
    with torch.no_grad():
        for name, parameter in engram.named_parameters():
            if name.endswith(("norm_weight", "convolution.weight")):
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return engram


def _inputs(engram: Engram, place: Tensor = PLACE) -> tuple[Tensor, MemoryRows]:
    batch, length = place.shape
    hidden = torch.randn(batch, length, engram.branches, WIDTH, dtype=torch.float64,
                         generator=torch.Generator().manual_seed(1)).requires_grad_()  # fmt: skip
    return hidden, random_memory(engram.config, batch, length, torch.float64)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean() + eps) * weight


def _by_loops(engram: Engram, hidden: Tensor, memory: MemoryRows, place: Tensor) -> Tensor:
    """The formulas of the paper, one token and branch at a time."""
    config = engram.config
    batch, length, branches, width = hidden.shape
    wq, wk = engram.query_norm_weight.view(branches, width), engram.key_norm_weight.view(branches, width)
    gated: dict[tuple[int, int, int], Tensor] = {}
    for b in range(batch):
        for t in range(length):
            first = (b * length + t) * config.lookups_per_token
            e = torch.cat(
                [memory.rows_UD[memory.index.index_N[first + s].long()] for s in range(config.lookups_per_token)]
            )
            for m in range(branches):
                k = engram.key_projs[m].weight @ e  # type: ignore[operator]
                q = _norm(hidden[b, t, m], wq[m], config.gate_eps)
                score = q @ _norm(k, wk[m], config.gate_eps) / math.sqrt(width)
                if config.gate == "signed_sqrt":
                    score = torch.sign(score) * torch.sqrt(torch.clamp(score.abs(), min=1e-6))
                gated[b, t, m] = torch.sigmoid(score) * (engram.value_proj.weight @ e)
    out = torch.stack([gated[b, t, m] for b in range(batch) for t in range(length) for m in range(branches)])
    out = out.view(hidden.shape)
    return out if engram.convolution is None else out + _convolution_by_loops(engram, gated, place, hidden.shape)


def _convolution_by_loops(engram: Engram, gated: dict[Any, Tensor], place: Tensor, shape: torch.Size) -> Tensor:
    assert engram.convolution is not None
    config, (batch, length, branches, width) = engram.config, shape
    taps = engram.convolution.weight.view(config.kernel_size, branches, width)
    norm_weight = engram.convolution.norm_weight.view(branches, width)
    rows = []
    for b in range(batch):
        for t in range(length):
            for m in range(branches):
                total = torch.zeros(width, dtype=torch.float64)
                for j in range(config.kernel_size):
                    distance = j * config.orders[-1]
                    if distance <= (t if config.cross_documents else int(place[b, t])):
                        total = total + taps[j, m] * _norm(gated[b, t - distance, m], norm_weight[m], 1e-6)
                rows.append(F.silu(total))
    return torch.stack(rows).view(shape)


@pytest.mark.parametrize("branches", [1, 4])
@pytest.mark.parametrize(
    "changes", [{}, {"gate": "plain"}, {"convolution": False}, {"cross_documents": True}, {"orders": [1, 2, 4]}]
)
def test_equals_explicit_loops_with_gradients(branches: int, changes: dict[str, Any]) -> None:
    engram = _engram(branches, **changes)
    hidden, memory = _inputs(engram)
    actual, expected = engram(hidden, memory, PLACE), _by_loops(engram, hidden, memory, PLACE)
    torch.testing.assert_close(actual, expected)
    leaves = [hidden, memory.rows_UD, *engram.parameters()]
    upstream = torch.randn(hidden.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(
        torch.autograd.grad(actual, leaves, upstream), torch.autograd.grad(expected, leaves, upstream)
    )


def test_convolution_starts_as_the_identity_and_learns() -> None:
    torch.manual_seed(0)
    engram = Engram(ENGRAM, WIDTH, branches=2, norm_eps=1e-6, std=0.3).double()
    hidden, memory = _inputs(engram)
    with_convolution = engram(hidden, memory, PLACE)
    with_convolution.square().sum().backward()
    assert engram.convolution is not None
    weight = engram.convolution.weight
    engram.convolution = None
    assert torch.equal(with_convolution, engram(hidden, memory, PLACE))
    assert weight.grad is not None
    assert weight.grad.all()


@pytest.mark.parametrize("cross_documents", [False, True])
def test_taps_stop_at_the_start_of_a_document(cross_documents: bool) -> None:
    engram = _engram(1, cross_documents=cross_documents)
    assert engram.convolution is not None
    values = torch.randn(1, 16, 1, WIDTH, dtype=torch.float64).requires_grad_()
    engram.convolution(values, PLACE[:1])[0, 12].sum().backward()  # position 1 of the second document
    assert values.grad is not None
    reached = [t for t in range(16) if values.grad[0, t].any()]
    assert reached == ([3, 6, 9, 12] if cross_documents else [12])


def test_a_sequence_shorter_than_the_taps() -> None:
    engram = _engram(1)
    hidden, memory = _inputs(engram, positions(2))
    torch.testing.assert_close(engram(hidden, memory, positions(2)), _by_loops(engram, hidden, memory, positions(2)))


def test_wrong_number_of_lookups_is_refused() -> None:
    engram = _engram(1)
    hidden, memory = _inputs(engram)
    with pytest.raises(ValueError, match="128 lookups for 1 x 16 tokens of 4 rows each"):
        engram(hidden[:1], memory, PLACE[:1])


def test_vectors_are_one_dimensional_for_optimizers_that_pick_matrices() -> None:
    engram = _engram(4)
    assert sorted(name for name, p in engram.named_parameters() if p.dim() >= 2) == [
        *(f"key_projs.{m}.weight" for m in range(4)),
        "value_proj.weight",
    ]


def test_sizes_follow_the_config() -> None:
    config = EngramConfig(layers=[1, 14], orders=[2, 3], heads=8, row_dim=80, rows_per_head=2_262_400)
    assert (config.lookups_per_token, config.memory_width) == (16, 1280)
