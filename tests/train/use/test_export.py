"""The files of an export: their names, sizes and dtypes, and how they are written. What loads them is tested in
tests/train/huggingface."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import train.use.export
from launch.bench.peak_memory import PeakMemory
from model.config import (
    AttentionConfig,
    EngramConfig,
    HyperConnectionsConfig,
    ModelConfig,
    MoEConfig,
    RopeScalingConfig,
)
from tests.command_line import JOB, write_job
from tests.command_line import train as train_command
from train.checkpoint.saved_tables import SavedTables
from train.checkpoint.saved_weights import SavedWeights
from train.checkpoint.tensor_files import write_tensors
from train.errors import UserError
from train.huggingface.config import deepseek_v3_config, why_not_deepseek_v3
from train.use.export import export
from train.use.saved_run import SavedRun

EXPERTS = "model.layers.1.mlp.experts"


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An export's config, and its tensors as its index finds them; those in no index are under their files' names."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    assert files.keys() == set(index["weight_map"].values())
    assert sum(map(len, files.values())) == len(index["weight_map"])
    found = {name: files[file][name] for name, file in index["weight_map"].items()}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    tables = {str(path.relative_to(folder)): load_file(path)["rows"] for path in folder.glob("tables/*")}
    return json.loads((folder / "config.json").read_text()), found | tables


def test_every_weight_and_every_row_is_there(trained: Path, tmp_path: Path) -> None:
    found, saved = export(SavedRun.open(trained), tmp_path / "new" / "out"), SavedRun.open(trained)
    config, exported = read(tmp_path / "new" / "out")
    assert (found.step, found.model_type, found.why) == (6, "engram", "model.engram")
    assert (found.files, found.tensors) == (1 + 2, len(exported))
    assert found.bytes == sum(tensor.nbytes for tensor in exported.values())
    ends = {"bos_token_id": None, "eos_token_id": saved.tokenizer.eos_id, "pad_token_id": saved.tokenizer.pad_id}
    assert json.loads((tmp_path / "new" / "out" / "generation_config.json").read_text()) == ends
    for module, entry in enumerate(config["engram"]["tables"]):
        rows = torch.cat([exported.pop(name) for name in entry["files"]])
        assert (entry["layer"], entry["rows"]) == (module, len(rows))
        assert torch.equal(rows, saved.tables().rows(module, torch.arange(len(rows))))  # type: ignore[union-attr]
    exported.pop("model.compressed_ids")
    weights = dict(saved.weights())
    gate_up, down = weights.pop(f"{EXPERTS}.gate_up_proj"), weights.pop(f"{EXPERTS}.down_proj")
    for expert in range(4):
        gate, up = (exported.pop(f"{EXPERTS}.{expert}.{name}_proj.weight") for name in ("gate", "up"))
        assert torch.equal(torch.cat([gate, up]), gate_up[expert])
        assert torch.equal(exported.pop(f"{EXPERTS}.{expert}.down_proj.weight"), down[expert])
    assert exported.keys() == weights.keys()
    assert all(torch.equal(each, exported[name]) for name, each in weights.items())
    assert (tmp_path / "new" / "out" / "tokenizer.json").read_text() == (trained / "tokenizer.json").read_text()


def test_files_have_a_limit_and_are_streamed(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit, row_bytes, most = 10_000, 4 * 4, []
    monkeypatch.setattr(train.use.export, "_CHUNK_BYTES", 20_000)
    rows = SavedTables.rows
    monkeypatch.setattr(SavedTables, "rows", lambda self, m, ids: most.append(len(ids)) or rows(self, m, ids))
    monkeypatch.setattr(SavedWeights, "__getitem__", None)  # a weight is never read whole
    export(SavedRun.open(trained), tmp_path / "out", shard_bytes=limit)
    assert len(most) > 10
    assert max(most) * 2 * 52 <= 20_000  # 52 bytes a record of 4 weights, 8 of Adam's moments and a version
    table = read(tmp_path / "out")[0]["engram"]["tables"][0]
    assert len(table["files"]) == -(-table["rows"] * row_bytes // limit) > 2
    for file in (tmp_path / "out").rglob("*.safetensors"):
        held = load_file(file)
        assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= limit


@pytest.mark.long
def test_memory_does_not_grow_with_the_table(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = JOB["model"]["engram"] | {"rows_per_head": 400_000, "row_dim": 16}
    offload = {"window_rows": 4000, "optimizer": {"type": "sgd"}}
    job = write_job(tmp_path, corpus, model=JOB["model"] | {"engram": wide}, train={"steps": 1}, offload=offload)
    train_command(job, "--nproc", "1")
    run = SavedRun.open(tmp_path / "runs" / "small")
    monkeypatch.setattr(train.use.export, "_CHUNK_BYTES", 4 << 20)
    with PeakMemory() as peak:
        found = export(run, tmp_path / "out")
    assert found.bytes > 200e6
    assert peak.bytes < 50e6


def test_a_part_of_a_weight_is_read_from_its_pieces_alone(trained: Path) -> None:
    weights = SavedRun.open(trained).weights()
    pieces, name = max((len(list(weights.pieces(name))), name) for name in weights)
    assert pieces >= 2  # two ranks wrote it
    whole = weights[name].flatten()
    border = len(next(weights.pieces(name)))
    for start, count in ((0, border), (border, 1), (border - 3, 5), (len(whole) - 5, 5), (0, len(whole))):
        found = list(weights.pieces(name, start, count))
        assert torch.equal(torch.cat(found), whole[start : start + count])
        assert len(found) == 1 + (start < border < start + count)


def test_the_card_tells_what_the_model_is(trained: Path, tmp_path: Path) -> None:
    export(SavedRun.open(trained), tmp_path / "out")
    text, summary = (tmp_path / "out" / "README.md").read_text(), json.loads((trained / "summary.json").read_text())
    rows = dict(
        line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ") and line != "| | |"
    )
    assert rows["parameters"] == f"{summary['parameters']:,}"
    assert rows["active a token"].startswith(f"{summary['active_parameters']:,}, ")
    assert rows["parameters in tables"] == f"{summary['table_parameters']:,}"
    assert rows["trained on"] == f"{summary['tokens']:,} tokens in 6 steps"
    assert rows["validation loss"] == f"{summary['val_loss']:.4f} nats a token"
    assert rows["text"] == Path(str(SavedRun.open(trained).job.data.path)).name
    assert str(trained.parents[2]) not in text
    assert "mixture of 4 experts, 2 and 1 shared a token; Engram memory (arXiv 2601.07372)" in rows["architecture"]
    assert "trust_remote_code=True" in text
    assert "license: fill in" in text
    export(SavedRun.open(trained, 3), tmp_path / "third")
    assert "| validation loss | not evaluated at this step |" in (tmp_path / "third" / "README.md").read_text()


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({}, None),
        ({"moe": None}, None),
        ({"norm_eps": 1e-5}, "model.norm_eps=1e-05, which is 1e-06 under the norms of its latents"),
        ({"moe": {"shared_experts": 0}}, "model.moe.shared_experts=0, of which it has at least one"),
        ({"moe": {"num_experts": 1, "experts_per_token": 1}}, "model.moe.num_experts=1, of which it has at least two"),
        ({"hyper_connections": {"expansion": 1}}, None),
        ({"hyper_connections": {}}, "model.hyper_connections"),
        ({"engram": {}}, "model.engram"),
    ],
)
def test_what_deepseek_v3_cannot_express(changed: dict[str, Any], why: str | None) -> None:
    model = ModelConfig.model_validate({"vocab_size": 300, "moe": {}} | changed)
    assert why_not_deepseek_v3(model) == why


def test_a_scale_of_yarn_without_mscale_is_said_for_readers_that_would_derive_another() -> None:
    scaling = {"factor": 8.0, "original_length": 64}
    for mscale, factor in ((0.0, 1.0), (1.0, None)):
        attention = {"rope_scaling": scaling | {"mscale": mscale}}
        model = ModelConfig.model_validate({"vocab_size": 300, "moe": {}, "attention": attention})
        assert deepseek_v3_config(model, 64)["rope_parameters"].get("attention_factor") == factor


SAID = {
    "model": "vocab_size hidden_size num_layers dense_layers dense_hidden_size tie_embeddings norm_eps init_std",
    "attention": "heads q_lora_rank kv_lora_rank qk_nope_dim qk_rope_dim v_dim rope_theta",
    "rope_scaling": "factor original_length alpha beta mscale",
    "moe": "num_experts experts_per_token shared_experts expert_hidden_size routed_scaling_factor norm_topk",
    "engram": "row_dim gate gate_eps convolution kernel_size",
    "addresses": "layers orders heads rows_per_head seed pad_id compress_tokens cross_documents",
    "hyper_connections": "expansion sinkhorn_iterations",
}
OF_TRAINING_ALONE = {"balance_rate", "sequence_balance_factor", "init_std", "alpha_init"}


def test_a_new_setting_of_the_model_is_thought_of() -> None:
    """One that changes what the model computes belongs in train/huggingface and its exported code, and in SAID."""
    configs = (ModelConfig, AttentionConfig, RopeScalingConfig, MoEConfig, EngramConfig, HyperConnectionsConfig)
    fields = {name for config in configs for name in config.model_fields} - set(SAID)
    assert fields == {name for names in SAID.values() for name in names.split()} | OF_TRAINING_ALONE


def test_a_failed_export_leaves_nothing(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(path: Path, sources: Any) -> None:
        write_tensors(path, sources)
        assert not (tmp_path / "out").exists()
        raise OSError("disk")

    monkeypatch.setattr(train.use.export, "write_tensors", fails)
    with pytest.raises(OSError, match="disk"):
        export(SavedRun.open(trained), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: room)
    monkeypatch.setattr(train.use.export, "write_tensors", None)
    with pytest.raises(UserError, match=r"0\.0 GB are needed, but 0\.0 GB are free"):
        export(SavedRun.open(trained), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_refused_and_an_empty_one_taken(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    export(SavedRun.open(trained), tmp_path / "out")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    with pytest.raises(UserError, match="is not empty"):
        export(SavedRun.open(trained), tmp_path / "out")
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
