"""Who sees whom, and the attention itself against explicit loops."""

import math

import pytest
import torch
from torch import Tensor

from model.attention import Attention, attention_context
from model.config import AttentionConfig
from model.rotary import rotary_angles, rotate
from tests.model.tiny import ATTENTION, positions


def _attention(config: AttentionConfig) -> Attention:
    torch.manual_seed(0)
    return Attention(config, 16, norm_eps=1e-6, std=0.3, output_std=0.3).double()


def test_mask_is_causal_and_within_documents() -> None:
    mask = attention_context(positions(2, 3), ATTENTION, torch.float32).mask_B1TT[0, 0]
    seen = [[0], [0, 1], [2], [2, 3], [2, 3, 4]]
    for query, keys in enumerate(seen):
        assert torch.nonzero(mask[query] == 0).flatten().tolist() == keys
        assert (mask[query].exp().sum() == len(keys)).all()


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
    cosine, sine = rotary_angles(place.unsqueeze(0), c.qk_rope_dim, c.rope_theta)

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
            weights = torch.softmax(torch.stack(keys) @ q / math.sqrt(query_width), dim=0)
            heads.append(weights @ torch.stack(values))
        rows.append(torch.cat(heads))
    return attention.o_proj(torch.stack(rows))


@pytest.mark.parametrize("config", [ATTENTION, ATTENTION.model_copy(update={"q_lora_rank": None, "v_dim": 10})])
def test_equals_explicit_loops(config: AttentionConfig) -> None:
    attention = _attention(config)
    place = positions(3, 4)
    hidden = torch.randn(1, 7, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    out = attention(hidden, attention_context(place, config, torch.float64))
    torch.testing.assert_close(out[0], _by_loops(attention, hidden[0], place[0]))
