"""The code of exports computes what model/ does, for every setting, with weights drawn so that all of them matter."""

import importlib
import importlib.resources
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.gather import row_index
from model.config import ModelConfig
from model.engram import MemoryRows
from model.transformer import LanguageModel
from offload.addresses.compression import identity_vocabulary
from offload.addresses.hashing import AddressBook
from train.huggingface.config import engram_config
from train.huggingface.names import published
from train.tables import addresses_of

VOCABULARY = 60
BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "num_layers": 3,
    "dense_hidden_size": 32,
    "attention": {"heads": 2, "kv_lora_rank": 16, "qk_nope_dim": 8, "qk_rope_dim": 4, "v_dim": 6},
    "moe": {"num_experts": 4, "experts_per_token": 2, "expert_hidden_size": 8},
    "engram": {"layers": [1, 2], "heads": 2, "rows_per_head": 50, "row_dim": 6},
}
ATTENTION, MOE, ENGRAM = BASE["attention"], BASE["moe"], BASE["engram"]
CHANGES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "norms": {"engram": None, "norm_eps": 1e-3},
    "one expert and no shared one": {"moe": MOE | {"num_experts": 1, "experts_per_token": 1, "shared_experts": 0}},
    "weights of experts": {"moe": MOE | {"norm_topk": False, "routed_scaling_factor": 2.5, "shared_experts": 2}},
    "dense": {"moe": None, "tie_embeddings": True},
    "branches alone": {"engram": None, "hyper_connections": {"expansion": 4, "sinkhorn_iterations": 3}},
    "branches": {"hyper_connections": {"expansion": 3}},
    "plain gate": {"engram": ENGRAM | {"gate": "plain", "gate_eps": 1e-2, "kernel_size": 2, "orders": [1, 3]}},
    "no convolution": {"engram": ENGRAM | {"convolution": False, "orders": [2, 3, 4]}},
    "across documents": {"engram": ENGRAM | {"cross_documents": True, "kernel_size": 1}},
    "one row": {"engram": ENGRAM | {"rows_per_head": 1}},
    "long": {
        "attention": ATTENTION
        | {"q_lora_rank": 8, "rope_theta": 500.0, "rope_scaling": {"factor": 8.0, "original_length": 4, "mscale": 0.5}}
    },
}


@pytest.fixture(scope="module")
def modeling() -> types.ModuleType:
    """The exported files, as a package of their own."""
    package = types.ModuleType("exported_code")
    package.__path__ = [str(importlib.resources.files("train.huggingface") / "exported")]
    sys.modules["exported_code"] = package
    return importlib.import_module("exported_code.modeling_engram")


class Both:
    """Training's model and the exported one, with the same weights and rows."""

    def __init__(self, changed: dict[str, Any], modeling: types.ModuleType) -> None:
        torch.manual_seed(0)
        config = ModelConfig.model_validate(BASE | changed)
        self.ours = LanguageModel(config).eval()
        for name, weight in self.ours.state_dict().items():
            if not name.endswith("proj.weight") and "embed" not in name:
                weight.add_(torch.randn_like(weight) * 0.3)
        self.book = self.addresses(config)
        fingerprint = self.book.fingerprint() if self.book else None
        written = engram_config(config, 64, fingerprint, [])
        settings = {key: value for key, value in written.items() if key not in ("architectures", "auto_map")}
        self.theirs = modeling.EngramForCausalLM(modeling.EngramConfig(**settings)).eval()
        state = {
            part.name: weight.flatten()[part.start : part.start + part.size].view(part.shape)
            for name, weight in self.ours.state_dict().items()
            for part in published(name, tuple(weight.shape))
        }
        if self.book:
            state["model.compressed_ids"] = torch.arange(VOCABULARY)
        self.theirs.load_state_dict(state)
        self.tables = [torch.randn(self.book.num_rows(m), 6) for m in range(self.book.num_modules)] if self.book else []
        self.theirs.model.tables = [table.__getitem__ for table in self.tables]

    @staticmethod
    def addresses(config: ModelConfig) -> AddressBook | None:
        return addresses_of(config.engram, identity_vocabulary(VOCABULARY, pad_id=2)) if config.engram else None

    def wanted(self, tokens_BT: Tensor, positions_BT: Tensor) -> Tensor:
        rows_LBTS = self.book.all_rows(tokens_BT, positions_BT) if self.book else []
        memory = [
            MemoryRows(table, row_index(rows_BTS.flatten(), len(table)))
            for table, rows_BTS in zip(self.tables, rows_LBTS, strict=True)
        ]
        return self.ours(tokens_BT, positions_BT, memory)


@pytest.mark.parametrize("kind", CHANGES)
@torch.no_grad()
def test_the_exported_code_computes_what_training_does(kind: str, modeling: types.ModuleType) -> None:
    both = Both(CHANGES[kind], modeling)
    tokens_BT = torch.randint(0, VOCABULARY, (2, 21))
    positions_BT = torch.tensor([[*range(21)], [*range(8), *range(13)]])
    close = {"rtol": 1e-5, "atol": 2e-5}
    wanted = both.wanted(tokens_BT, positions_BT)
    assert wanted.std() > 0.2
    found = both.theirs(tokens_BT, position_ids=positions_BT, use_cache=False).logits
    torch.testing.assert_close(found, wanted, **close)
    cache, parts = None, []
    for start, end in ((0, 5), (5, 6), (6, 17), (17, 21)):
        step = both.theirs(tokens_BT[:1, start:end], cache=cache)
        cache = step.cache
        parts.append(step.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), wanted[:1], **close)
