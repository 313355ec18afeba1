"""How many tokens get other experts if logits are taken in bf16: `python -m tests.model.router_precision SOURCE...`.

A source is a config, whose router is drawn anew and chooses for normalised random tokens, or the folder of a trained
run, whose routers choose for the hidden states of its own validation text. All compare the set of experts that a token
gets, for the same bf16 tokens, with that by the exact (fp64) product:

    bf16 logits         weight and product in bf16
    bf16 weight         weight in bf16, product in fp32: what training computes
    fp32                weight and product in fp32

The first is also compared with the second: the arithmetic alone.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.moe import MoE, Router
from train.config.file import load
from train.config.job import JobConfig

_TOKENS = 65_536
_SEQUENCES = 64


def chosen(logits_NE: Tensor, bias_E: Tensor, count: int) -> Tensor:
    """Which experts each token gets, [N, E]."""
    scores_NE = torch.sigmoid(logits_NE.to(torch.promote_types(logits_NE.dtype, torch.float32)))
    experts_NK = (scores_NE + bias_E).topk(count, dim=-1).indices
    return torch.zeros_like(scores_NE, dtype=torch.bool).scatter_(1, experts_NK, True)


def shares(tokens_ND: Tensor, weight_ED: Tensor, bias_E: Tensor, count: int) -> dict[str, float]:
    """Share of the tokens with another set of experts, by what is compared. `weight_ED` is fp32."""
    narrow_ND, narrow_ED = tokens_ND.bfloat16(), weight_ED.bfloat16()
    logits = {
        "exact": F.linear(narrow_ND.double(), weight_ED.double()),
        "fp32": F.linear(narrow_ND.float(), weight_ED),
        "bf16 weight": F.linear(narrow_ND.float(), narrow_ED.float()),
        "bf16 logits": F.linear(narrow_ND, narrow_ED),
    }
    sets = {name: chosen(each, bias_E, count) for name, each in logits.items()}

    def differ(one: str, other: str) -> float:
        return float((sets[one] != sets[other]).any(dim=1).float().mean())

    return {f"{name}, exact": differ(name, "exact") for name in ("bf16 logits", "bf16 weight", "fp32")} | {
        "bf16 logits, bf16 weight": differ("bf16 logits", "bf16 weight")
    }


def of_config(path: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """A router as the config's model begins with it."""
    config = load(path, [], JobConfig).model
    assert config.moe is not None
    torch.manual_seed(0)
    router = Router(config.moe, config.hidden_size, config.init_std)
    tokens = F.rms_norm(torch.randn(_TOKENS, config.hidden_size), (config.hidden_size,))
    weight, bias = router.weight.detach(), router.e_score_correction_bias
    yield "drawn", shares(tokens, weight, bias, config.moe.experts_per_token)


@torch.no_grad()
def of_run(folder: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """The routers of a trained run, layer by layer, on its validation text."""
    from train.data.open import open_data
    from train.use.saved_run import SavedRun
    from train.use.scoring import score

    run = SavedRun.open(folder)
    seen: dict[str, list[Tensor]] = {}
    model, weights = run.model(), run.weights()
    for name, layer in model.named_modules():
        if isinstance(layer, MoE):

            def keep(_: Any, arguments: tuple[Tensor], name: str = name) -> None:
                seen.setdefault(name, []).append(arguments[0])

            layer.gate.register_forward_pre_hook(keep)
    SavedRun.model = lambda _: model  # type: ignore[method-assign]
    score(run, open_data(run.job.data), split="validation", sequences=_SEQUENCES)
    for name, tokens in seen.items():
        gate = model.get_submodule(f"{name}.gate")
        weight_ED = torch.cat([*weights.pieces(f"{name}.gate.weight")]).view(gate.weight.shape)
        yield name, shares(torch.cat(tokens), weight_ED, gate.e_score_correction_bias, gate.config.experts_per_token)


def _main(sources: list[str]) -> None:
    for source in map(Path, sources):
        for name, found in (of_run if source.is_dir() else of_config)(source):
            print(f"{source} {name}: " + "; ".join(f"{what} {share:.3%}" for what, share in found.items()))


if __name__ == "__main__":
    _main(sys.argv[1:])
