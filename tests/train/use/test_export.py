"""An export holds the whole model: what follows reads it with nothing but its files and the safetensors library."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import train.use.export
from kernels.gather import row_index
from model.config import ModelConfig
from model.engram import MemoryRows
from model.transformer import LanguageModel
from train.checkpoint.saved_tables import SavedTables
from train.checkpoint.tensor_files import write_tensors
from train.errors import UserError
from train.use.export import export
from train.use.saved_run import SavedRun

TOKENS = [17, 200, 3, 17, 200, 3, 0, 299, 4, 5]


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An export's config, and its tensors as its index finds them."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = {name: load_file(folder / name) for name in set(index["weight_map"].values())}
    assert sum(map(len, files.values())) == len(index["weight_map"])
    return json.loads((folder / "config.json").read_text()), {
        name: files[file][name] for name, file in index["weight_map"].items()
    }


def lookups(config: dict[str, Any], compressed_V: np.ndarray, module: int) -> list[int]:
    """Rows of a table that TOKENS, one document, read: token by token, from the formula and the config's numbers."""
    numbers = config["engram"]["addresses"]
    multipliers, primes = numbers["multipliers"][module], numbers["primes"][module]
    ids = [int(compressed_V[token]) for token in TOKENS]
    rows = []
    for place in range(len(ids)):
        for order_number, order in enumerate(numbers["orders"]):
            mix = 0
            for back in range(order):
                mix ^= (ids[place - back] if back <= place else numbers["pad_id"]) * multipliers[back]
            for head in range(numbers["heads"]):
                slot = order_number * numbers["heads"] + head
                rows.append(sum(primes[:slot]) + mix % primes[slot])
    return rows


@torch.no_grad()
def exported_logits(folder: Path) -> Tensor:
    config, tensors = read(folder)
    model = LanguageModel(ModelConfig.model_validate(config["model"])).eval()
    engram = config["engram"]
    assert engram is not None
    memory = []
    for module, entry in enumerate(engram["tables"]):
        table = torch.cat([tensors.pop(name) for name in entry["tensors"]])
        assert list(table.shape) == entry["shape"]
        index_N = torch.tensor(lookups(config, tensors[engram["compressed_ids"]].numpy(), module))
        memory.append(MemoryRows(table.float(), row_index(index_N, len(table))))
    del tensors[engram["compressed_ids"]]
    model.load_state_dict(tensors)
    return model(torch.tensor([TOKENS]), torch.arange(len(TOKENS))[None], memory)


@torch.no_grad()
def run_logits(run: Path) -> Tensor:
    saved = SavedRun.open(run)
    tokens_BT, positions_BT = torch.tensor([TOKENS]), torch.arange(len(TOKENS))[None]
    tables = saved.tables()
    assert tables is not None
    return saved.model()(tokens_BT, positions_BT, tables.look_up(tokens_BT, positions_BT))


def test_an_export_computes_the_runs_logits_and_names_every_shape(trained: Path, tmp_path: Path) -> None:
    found = export(SavedRun.open(trained), tmp_path / "new" / "out")
    assert torch.equal(exported_logits(tmp_path / "new" / "out"), run_logits(trained))
    config, tensors = read(tmp_path / "new" / "out")
    assert config["tensors"] == {
        name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        for name, tensor in tensors.items()
    }
    assert (found.files, found.tensors, found.step) == (1, len(tensors), 6)
    assert found.bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert (tmp_path / "new" / "out" / "tokenizer.json").read_text() == (trained / "tokenizer.json").read_text()


def test_files_have_a_limit_and_tables_stream(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit, row_bytes, most = 10_000, 4 * 4, []
    monkeypatch.setattr(train.use.export, "_CHUNK_BYTES", 20_000)
    rows = SavedTables.rows
    monkeypatch.setattr(SavedTables, "rows", lambda self, m, ids: most.append(len(ids)) or rows(self, m, ids))
    export(SavedRun.open(trained), tmp_path / "out", shard_bytes=limit)
    assert len(most) > 10
    assert max(most) * 2 * 52 <= 20_000  # 52 bytes a record of 4 weights, 8 of Adam's moments and a version
    config, _ = read(tmp_path / "out")
    parts = config["engram"]["tables"][0]["tensors"]
    assert len(parts) == -(-config["engram"]["tables"][0]["shape"][0] * row_bytes // limit) > 2
    for file in (tmp_path / "out").glob("*.safetensors"):
        held = load_file(file)
        assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= limit
    assert torch.equal(exported_logits(tmp_path / "out"), run_logits(trained))


def test_bf16_keeps_what_chooses_experts(trained: Path, tmp_path: Path) -> None:
    export(SavedRun.open(trained), tmp_path / "out", dtype="bf16")
    config, tensors = read(tmp_path / "out")
    wide = {name for name, tensor in tensors.items() if tensor.dtype == torch.float32}
    assert wide == {f"model.layers.1.mlp.gate.{name}" for name in ("weight", "e_score_correction_bias")}
    gate = SavedRun.open(trained).weights()
    saved = torch.cat([*gate.pieces("model.layers.1.mlp.gate.weight")])
    assert torch.equal(tensors["model.layers.1.mlp.gate.weight"].flatten(), saved)
    assert config["torch_dtype"] == "bfloat16"
    torch.testing.assert_close(exported_logits(tmp_path / "out"), run_logits(trained), rtol=0.1, atol=0.1)


def test_a_failed_export_leaves_nothing(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(path: Path, sources: Any) -> None:
        write_tensors(path, sources)
        assert not (tmp_path / "out").exists()
        raise OSError("disk")

    monkeypatch.setattr(train.use.export, "write_tensors", fails)
    with pytest.raises(OSError, match="disk"):
        export(SavedRun.open(trained), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_refused_and_an_empty_one_taken(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    export(SavedRun.open(trained), tmp_path / "out")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    with pytest.raises(UserError, match="is not empty"):
        export(SavedRun.open(trained), tmp_path / "out")
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
