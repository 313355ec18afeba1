"""Blocks that are recomputed or compiled train as others do, where DeepSpeed's hooks and layers are in them."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from model.compilation import compile_blocks
from model.transformer import Block, LanguageModel
from tests.distributed import run_ranks
from tests.model.tiny import ENGRAM, memories, positions, random_tokens, tiny_config
from train.build import _require_compiler
from train.config.deepspeed import DeepSpeedConfig
from train.engine import Engine
from train.errors import UserError
from train.optim.optimizer import OptimizerConfig

Cases = dict[tuple[int, int], list[str]]
# ZeRO stage, ranks that the experts are spread over; each also without anything, to compare with. What one process has
# compiled it does not compile again; rank 0 alone compiles, which takes long: the other shows what it exchanges with.
CASES: Cases = {(3, 2): ["recomputed and compiled", "recomputed"], (3, 1): ["recomputed and compiled"]}
LONG: Cases = {(3, 2): ["compiled"]}
DOCUMENTS = [(20, 12), (5, 20, 7)]


def train_once(stage: int, expert_ranks: int, way: str) -> dict[str, Any]:
    """Losses, gradients and token counts of two steps, and the loss of an evaluation."""
    torch.manual_seed(0)
    sections: dict[str, Any] = {"zero_optimization": {"stage": stage}}
    if expert_ranks > 1:
        sections["expert_parallel"] = {"enabled": True, "autoep_size": expert_ranks}
    config = tiny_config(num_layers=1, dense_layers=0, engram=ENGRAM.model_copy(update={"layers": [0]}))
    engine = Engine(
        LanguageModel(config, recompute="recomputed" in way),
        optimizer=OptimizerConfig(name="adamw", learning_rate=1e-2),
        deepspeed_config=DeepSpeedConfig(**sections),
        gathered_whole=Block if "compiled" in way else None,
    )
    model: Any = engine.module
    if "compiled" in way and dist.get_rank() == 0:
        compile_blocks(model, backend="aot_eager")
    within = [part for block in model.modules() if isinstance(block, Block) for part in block.children()]
    found: dict[str, Any] = {"losses": [], "norms": [], "rows": []}
    found["gathered_apart"] = any(part._forward_pre_hooks for part in within)
    for step, documents in enumerate(DOCUMENTS):
        tokens = random_tokens(2, 32, seed=10 * step + dist.get_rank())
        memory = memories(model, 2, 32)
        loss = engine(tokens, positions(*documents, batch=2), memory, tokens) / 64
        engine.backward(loss)
        found["losses"].append(loss.item())
        found["norms"].append(engine.gradient_norm_squared().item())
        found["rows"] += [table.rows_UD.grad.flatten().tolist() for table in memory if table.rows_UD.grad is not None]
        engine.step(lr_factor=1.0)
    found["counts"] = [b.tolist() for name, b in model.named_buffers() if name.endswith("tokens_per_expert")]
    model.eval()
    with torch.no_grad():
        found["losses"].append(engine(tokens, positions(32, batch=2), memory, tokens).item())
    engine.close()
    return found


def train_all(cases: Cases) -> dict[Any, dict[str, Any]]:
    """Every case, one after the other."""
    return {(case, way): train_once(*case, way) for case, ways in cases.items() for way in ("plain", *ways)}


@pytest.fixture(scope="module")
def runs() -> list[Any]:
    return run_ranks(train_all, 2, CASES)


@pytest.mark.parametrize(("case", "way"), [(case, way) for case, ways in CASES.items() for way in ways])
def test_training_is_the_same(runs: list[Any], case: tuple[int, int], way: str) -> None:
    require_the_same(runs, case, way)


@pytest.mark.long
def test_training_is_the_same_whatever_is_combined() -> None:
    runs = run_ranks(train_all, 2, LONG)
    for case, ways in LONG.items():
        for way in ways:
            require_the_same(runs, case, way)


def require_the_same(runs: list[Any], case: tuple[int, int], way: str) -> None:
    """As without anything, on both ranks."""
    for rank in runs:
        plain, found = rank[case, "plain"], rank[case, way]
        assert plain["gathered_apart"]
        assert found["gathered_apart"] == ("compiled" not in way), "ZeRO 3 gathers a block's parameters within it"
        assert found["losses"] == pytest.approx(plain["losses"], rel=1e-5)
        assert found["norms"] == pytest.approx(plain["norms"], rel=1e-3)
        assert found["counts"] == plain["counts"]
        assert sum(map(sum, found["counts"])) > 0
        assert len(found["rows"]) == len(DOCUMENTS)
        for gradient, expected in zip(found["rows"], plain["rows"], strict=True):
            assert gradient == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_compiling_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    _require_compiler(torch.device("cuda"))
    with pytest.raises(UserError, match=r"there is no no-such-compiler: .* or set train\.compile=false"):
        _require_compiler(torch.device("cpu"))
