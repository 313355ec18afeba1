"""Properties of the whole model: what influences what, precision, repeatability, the loss."""

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.gather import row_index
from model.transformer import LanguageModel
from tests.model.tiny import ENGRAM, HYPER_CONNECTIONS, VOCABULARY, memories, positions, random_tokens, tiny_model

BRANCHED = {"hyper_connections": HYPER_CONNECTIONS}
VARIANTS: list[dict[str, Any]] = [{}, {"engram": None}, {"moe": None}, {"moe": None, "engram": None}, BRANCHED]


def _logits(model: LanguageModel, tokens: Tensor, place: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    with torch.no_grad():
        return model(tokens, place, memories(model, *tokens.shape, dtype))


@pytest.mark.parametrize("changes", VARIANTS)
def test_later_tokens_change_nothing(changes: dict[str, Any]) -> None:
    model, place = tiny_model(torch.float64, **changes), positions(12)
    tokens = random_tokens(1, 12)
    other = tokens.clone()
    other[:, 7:] = (other[:, 7:] + 1) % VOCABULARY
    before, after = _logits(model, tokens, place), _logits(model, other, place)
    torch.testing.assert_close(after[:, :7], before[:, :7], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(after[:, 7:], before[:, 7:])


@pytest.mark.parametrize("changes", VARIANTS)
def test_documents_of_one_sequence_are_independent(changes: dict[str, Any]) -> None:
    model, place = tiny_model(torch.float64, **changes), positions(5, 6, 4)
    tokens = random_tokens(1, 15)
    other = tokens.clone()
    other[:, :5] = (other[:, :5] + 1) % VOCABULARY
    before, after = _logits(model, tokens, place), _logits(model, other, place)
    torch.testing.assert_close(after[:, 5:], before[:, 5:], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(after[:, :5], before[:, :5])


def test_a_document_means_the_same_wherever_it_is_packed() -> None:
    model = tiny_model(torch.float64, engram=None)
    tokens = random_tokens(1, 9)
    packed = _logits(model, tokens, positions(4, 5))
    torch.testing.assert_close(packed[:, 4:], _logits(model, tokens[:, 4:], positions(5)), rtol=1e-12, atol=1e-12)


def test_memory_reaches_the_output_and_only_from_its_token_on() -> None:
    model, place = tiny_model(torch.float64), positions(10)
    tokens, memory = random_tokens(1, 10), memories(model, 1, 10, torch.float64)
    memory = [table._replace(index=row_index(torch.arange(40), 40)) for table in memory]  # a row for every lookup
    model(tokens, place, memory)[0, 5].sum().backward()
    for table in memory:
        assert table.rows_UD.grad is not None
        assert [bool(token.any()) for token in table.rows_UD.grad.view(10, -1)] == [True] * 6 + [False] * 4


def test_loss_is_the_sum_over_labels_that_count() -> None:
    model, place, tokens = tiny_model(), positions(8, batch=2), random_tokens(2, 8)
    labels = random_tokens(2, 8, seed=3)
    labels[0, :5] = -100
    logits = model(tokens, place, memories(model, 2, 8))
    loss = model(tokens, place, memories(model, 2, 8), labels)
    chosen = F.log_softmax(logits, dim=-1).gather(2, labels.clamp(min=0).unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(loss, -(chosen * (labels >= 0)).sum())
    nothing = model(tokens, place, memories(model, 2, 8), torch.full_like(labels, -100))
    nothing.backward()
    assert nothing == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def _loss_and_gradients(dtype: torch.dtype, changes: dict[str, Any]) -> list[Tensor]:
    model = tiny_model(dtype, **changes)
    memory = memories(model, 4, 64)
    tokens = random_tokens(4, 64)
    loss = model(tokens, positions(40, 24, batch=4), memory, tokens)
    loss.backward()
    leaves = [*model.parameters(), *(m.rows_UD for m in memory)]
    return [loss.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize(
    ("dtype", "changes", "times"),
    [(torch.float32, BRANCHED, 2)]
    + [
        pytest.param(*case, 3, marks=pytest.mark.long)
        for case in product([torch.float32, torch.bfloat16], [BRANCHED, {}])
    ],
)
def test_bitwise_repeatable(dtype: torch.dtype, changes: dict[str, Any], times: int) -> None:
    """With two threads, which wait for each other at work."""
    torch.set_num_threads(2)
    first, *others = [_loss_and_gradients(dtype, changes) for _ in range(times)]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


# Scores near 0 turn up where each branch has its own; there the signed root's slope, up to 500, magnifies any rounding.
PLAIN_GATE = {"engram": ENGRAM.model_copy(update={"gate": "plain"})}


@pytest.mark.parametrize("changes", [{}, BRANCHED | PLAIN_GATE], ids=["plain", "branched"])
def test_bf16_follows_fp32(changes: dict[str, Any]) -> None:
    narrow, wide = (_loss_and_gradients(dtype, changes) for dtype in (torch.bfloat16, torch.float32))
    assert narrow[0].dtype == torch.float32
    torch.testing.assert_close(narrow[0], wide[0], rtol=2e-3, atol=0)
    assert len(narrow) == len(wide)
    for a, b in zip(narrow[1:], wide[1:], strict=True):
        assert F.cosine_similarity(a.float().flatten(), b.flatten(), dim=0) > 0.95 or b.norm() < 1e-3


@pytest.mark.parametrize("changes", VARIANTS)
def test_recomputing_blocks_changes_no_bit_and_counts_tokens_once(changes: dict[str, Any]) -> None:
    results, kept = [], []
    for recompute in (False, True):
        model = tiny_model(**changes)
        model.model.recompute = recompute
        memory, tokens = memories(model, 2, 64), random_tokens(2, 64)
        saved: dict[int, int] = {}

        def keep(tensor: Tensor, saved: dict[int, int] = saved) -> Tensor:
            saved[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(tokens, positions(40, 24, batch=2), memory, tokens)
        loss.backward()
        counts = [counts.clone() for name, counts in model.named_buffers() if name.endswith("tokens_per_expert")]
        assert all(layer.sum() == 2 * 2 * 64 for layer in counts)
        results.append([loss, *counts, *(leaf.grad for leaf in (*model.parameters(), *(m.rows_UD for m in memory)))])
        kept.append(sum(saved.values()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert kept[1] < kept[0] / 2


def test_initialisation_follows_the_global_seed() -> None:
    first, same, other = (tiny_model(seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_initial_spread() -> None:
    torch.manual_seed(0)
    model = LanguageModel(tiny_model().config.model_copy(update={"hidden_size": 128, "init_std": 0.02}))
    spread = {name: p.std().item() for name, p in model.named_parameters() if p.dim() >= 2}
    for name, value in spread.items():
        narrow = name.endswith(("o_proj.weight", "down_proj.weight", "down_proj"))
        assert value == pytest.approx(0.02 / 6**0.5 if narrow else 0.02, rel=0.15), name


def test_memory_of_the_wrong_tables_is_refused() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=r"rows of 1 tables were given, but Engram layers are \[1, 2\]"):
        model(random_tokens(1, 4), positions(4), memories(model, 1, 4)[:1])


def test_tied_embeddings_share_one_weight() -> None:
    model = tiny_model(tie_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in dict(model.named_parameters())
