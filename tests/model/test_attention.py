"""Who sees whom, and the attention itself against explicit loops."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from model.attention import Attention, attention_context
from model.config import AttentionConfig, RopeScalingConfig
from model.document_attention import attend, document_blocks, documents
from model.rotary import rotary_angles, rotate
from tests.model.tiny import ATTENTION, positions


def _attention(config: AttentionConfig) -> Attention:
    torch.manual_seed(0)
    return Attention(config, 16, norm_eps=1e-6, std=0.3, output_std=0.3).double()


def _sees(place: Tensor) -> Tensor:
    """[B, T, T]: the dense mask."""
    # Within a row, so that a row whose first position is not 0 still begins a document.
    document = (place == 0).cumsum(dim=1)
    return (document.unsqueeze(1) == document.unsqueeze(2)) & torch.ones(place.shape[1], place.shape[1]).tril().bool()


def _long_positions(length: int) -> Tensor:
    """Documents within a block, over blocks, of one token, of a whole row, and one that began before the row."""
    rows = [(1, 300, 83, 128, length - 512), (128, 128, length - 256), (length,), (length - 1, 1)]
    return torch.cat([*(positions(*lengths) for lengths in rows), positions(90, length)[:, 60:-30]])


@pytest.mark.parametrize(("query_columns", "value_columns"), [(12, 8), (8, 12)])
def test_long_documents_equal_a_dense_mask(query_columns: int, value_columns: int) -> None:
    place, generator = _long_positions(600), torch.Generator().manual_seed(0)
    shape = (*place.shape, 2)
    query, key = torch.randn(2, *shape, query_columns, generator=generator, dtype=torch.float64)
    value, into = torch.randn(2, *shape, value_columns, generator=generator, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (query, key, value)]
    mixed = attend(query, key, value, documents(place, torch.float64, 8), 0.4)
    logits = torch.einsum("bqhc,bkhc->bhqk", query, key) * 0.4
    weights = logits.masked_fill(~_sees(place).unsqueeze(1), float("-inf")).softmax(dim=-1)
    expected = torch.einsum("bhqk,bkhc->bqhc", weights, value)
    torch.testing.assert_close(mixed, expected)
    for found, right in zip(
        torch.autograd.grad((mixed * into).sum(), leaves),
        torch.autograd.grad((expected * into).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(found, right)


def test_blocks_for_flex_attention_cover_what_is_seen_and_no_more() -> None:
    place = _long_positions(640)
    mask, sees = document_blocks((place == 0).cumsum(dim=1)), _sees(place)
    index = torch.arange(640)
    assert mask.mask_mod is not None
    for row in range(len(place)):
        found = mask.mask_mod(torch.tensor(row), torch.tensor(0), index.unsqueeze(1), index.unsqueeze(0))
        assert torch.equal(found, sees[row])
    parts = sees.view(len(place), 5, 128, 5, 128).sum(dim=(2, 4))
    assert torch.equal(mask.to_dense()[:, 0] > 0, parts > 0)
    assert mask.full_kv_num_blocks is not None
    assert mask.full_kv_indices is not None
    for row, query in itertools.product(range(len(place)), range(5)):
        full = mask.full_kv_indices[row, 0, query, : mask.full_kv_num_blocks[row, 0, query]].tolist()
        assert full == torch.nonzero(parts[row, query] == 128 * 128).flatten().tolist()


@pytest.mark.gpu
def test_flex_attention_equals_document_by_document() -> None:
    length = 1024
    place = torch.cat([positions(100, 300, length - 400), positions(length)]).cuda()
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (2, length, 4)
    query, key = torch.randn(2, *shape, 192, generator=generator, device="cuda", dtype=torch.bfloat16)
    value, into = torch.randn(2, *shape, 128, generator=generator, device="cuda", dtype=torch.bfloat16)
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        q, k, v = leaves = [x.detach().to(dtype).requires_grad_() for x in (query, key, value)]
        within = documents(place, dtype, 128)
        assert (within.block_mask is None) == (dtype == torch.float32)
        assert documents(place[:, :-1], dtype, 128).block_mask is None
        mixed = attend(q, k, v, within, 0.07)
        results.append([mixed, *torch.autograd.grad((mixed * into).sum(), leaves)])
    for narrow, wide in zip(*results, strict=True):
        torch.testing.assert_close(narrow.float(), wide, atol=0.02 * float(wide.abs().max()), rtol=0.02)


def test_rotation_by_hand() -> None:
    cosine, sine = rotary_angles(torch.tensor([[0, 3]]), 4, 100.0)
    turned = rotate(torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]] * 2]).view(1, 2, 1, 4), cosine, sine)
    torch.testing.assert_close(turned[0, 0, 0], torch.tensor([1.0, 2.0, 3.0, 4.0]))
    expected = []
    for x, y, angle in ((1.0, 2.0, 3.0), (3.0, 4.0, 0.3)):
        expected += [x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)]
    torch.testing.assert_close(turned[0, 1, 0], torch.tensor(expected))


def test_rotated_products_depend_on_distance_only() -> None:
    query, key = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0))

    def product(query_position: int, key_position: int) -> Tensor:
        turned = [
            rotate(x, *rotary_angles(torch.tensor([[p]]), 8, 10000.0))
            for x, p in ((query, query_position), (key, key_position))
        ]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(product(9, 4), product(105, 100), rtol=1e-4, atol=1e-5)
    assert not torch.isclose(product(9, 4), product(9, 5))


def _by_loops(attention: Attention, hidden: Tensor, place: Tensor) -> Tensor:
    """One batch row, one head, one query at a time."""
    c = attention.config
    cosine, sine = rotary_angles(place.unsqueeze(0), c.qk_rope_dim, c.rope_theta, c.rope_scaling)
    sharper = 1 if c.rope_scaling is None else (0.1 * c.rope_scaling.mscale * math.log(c.rope_scaling.factor) + 1) ** 2

    def turn(x: Tensor, t: int) -> Tensor:
        return rotate(x.view(1, 1, 1, -1), cosine[:, t : t + 1], sine[:, t : t + 1]).flatten()

    if c.q_lora_rank is None:
        queries = attention.q_proj(hidden)
    else:
        queries = attention.q_b_proj(attention.q_a_layernorm(attention.q_a_proj(hidden)))
    latent = attention.kv_a_proj_with_mqa(hidden)
    unpacked = attention.kv_b_proj(attention.kv_a_layernorm(latent[:, : c.kv_lora_rank]))
    query_width, value_width = c.qk_nope_dim + c.qk_rope_dim, c.qk_nope_dim + c.v_dim
    rows = []
    for t in range(len(hidden)):
        heads = []
        for h in range(c.heads):
            q = queries[t, h * query_width : (h + 1) * query_width]
            q = torch.cat((q[: c.qk_nope_dim], turn(q[c.qk_nope_dim :], t)))
            keys, values = [], []
            for s in range(t - int(place[t]), t + 1):
                head = unpacked[s, h * value_width : (h + 1) * value_width]
                keys.append(torch.cat((head[: c.qk_nope_dim], turn(latent[s, c.kv_lora_rank :], s))))
                values.append(head[c.qk_nope_dim :])
            weights = torch.softmax(torch.stack(keys) @ q * sharper / math.sqrt(query_width), dim=0)
            heads.append(weights @ torch.stack(values))
        rows.append(torch.cat(heads))
    return attention.o_proj(torch.stack(rows))


@pytest.mark.parametrize(
    "changes",
    [{}, {"q_lora_rank": None, "v_dim": 10}, {"rope_scaling": RopeScalingConfig(factor=8.0, original_length=20)}],
)
def test_equals_explicit_loops(changes: dict[str, Any]) -> None:
    config = ATTENTION.model_copy(update=changes)
    attention = _attention(config)
    place = positions(3, 4)
    hidden = torch.randn(1, 7, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    out = attention(hidden, attention_context(place, config, torch.float64))
    torch.testing.assert_close(out[0], _by_loops(attention, hidden[0], place[0]))
