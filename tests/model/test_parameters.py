"""What an optimizer may tell by name."""

from model.parameters import parameter_kind
from tests.model.tiny import HYPER_CONNECTIONS, tiny_model


def test_kinds() -> None:
    kinds: dict[str, set[str]] = {}
    for name, parameter in tiny_model(hyper_connections=HYPER_CONNECTIONS).named_parameters():
        kinds.setdefault(parameter_kind(name, parameter.shape), set()).add(name)
        if parameter.dim() == 1:
            assert parameter_kind(name, parameter.shape) == "vector"
    assert kinds["embedding"] == {"model.embed_tokens.weight"}
    assert kinds["head"] == {"lm_head.weight"}
    assert kinds["router"] == {f"model.layers.{n}.mlp.gate.weight" for n in (1, 2)}
    assert kinds["mapping"] == {
        f"model.layers.{n}.{f}_hyper_connection.weight" for n in range(3) for f in ("attn", "mlp")
    }
    assert "model.layers.1.engram.value_proj.weight" in kinds["matrix"]
    assert "model.layers.1.mlp.shared_experts.down_proj.weight" in kinds["matrix"]
    assert parameter_kind("model.layers.1.mlp.router.gate.weight", (6, 16)) == "router"
    assert parameter_kind("model.layers.1.mlp.experts.w1", (3, 16, 16)) == "expert"
