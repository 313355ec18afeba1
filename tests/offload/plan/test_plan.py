"""What a plan says of the tokens that it was made for."""

import torch

from offload.plan.plan import digest_tokens


def test_the_digest_sees_ids_order_and_zeros() -> None:
    tokens = torch.tensor([[0, 0, 5], [7, 0, 1]])
    others = [torch.tensor([[0, 0, 5], [0, 7, 1]]), torch.tensor([[0, 0, 5], [7, 0, 2]]), torch.zeros(2, 3).long()]
    assert len({digest_tokens([batch]) for batch in [tokens, *others]}) == 4
    assert digest_tokens([tokens]) != digest_tokens([tokens, torch.zeros(1, 1).long()])
