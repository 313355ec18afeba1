"""Writes a saved run as a folder of safetensors files that other programs can read.

    config.json                       sizes, every tensor's shape, and all numbers that table addresses derive from
    model-00001-of-00003.safetensors  backbone, then tables, in files up to a size
    model.safetensors.index.json      the file of every tensor
    tokenizer.json, tokenizer_config.json

Names of the backbone's tensors are those of training. The table of block N is `model.layers.N.engram.table.00000` and
so on: ranges of its rows, in order, none larger than a file. `engram.compressed_ids` maps token ids to hashed ids.

Shape suffixes: V vocabulary, R rows of a range.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from model.config import RopeScalingConfig
from model.parameters import kind_of
from train.checkpoint.saved_tables import SavedTables
from train.checkpoint.saved_weights import SavedWeights
from train.checkpoint.tensor_files import TensorSource, split, write_tensors
from train.errors import UserError
from train.files import new_folder
from train.tables import compressed_vocabulary
from train.use.saved_run import DTYPES, RunTokens, SavedRun

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
COMPRESSED_IDS = "engram.compressed_ids"
SHARD_BYTES = 5 * 10**9
_CHUNK_BYTES = 64 << 20
"""Bytes of table rows that are in memory at a time."""


@dataclass(frozen=True)
class Export:
    """What was written: the folder, the checkpoint's step, the number of files and tensors, bytes of all tensors."""

    folder: str
    step: int
    files: int
    tensors: int
    bytes: int


def export(
    run: SavedRun, folder: Path, *, dtype: Literal["fp32", "bf16"] | None = None, shard_bytes: int = SHARD_BYTES
) -> Export:
    """Writes the checkpoint into `folder`, which appears when it is complete.

    Args:
        run: the checkpoint.
        folder: must not exist, or be empty.
        dtype: of weights and rows; by default that of the run's arithmetic. What chooses experts stays fp32.
        shard_bytes: tensors are spread over files of at most this size; only a single tensor of the backbone may be
            larger.

    Raises:
        UserError: the folder is in use, the disk too small, or the checkpoint damaged.
        OSError: the disk cannot be written.
    """
    target_dtype = DTYPES[dtype or run.job.train.dtype]
    sources, tables = _sources(run, target_dtype, shard_bytes)
    parts = list(split(sources, shard_bytes))
    names = [f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
    size = sum(source.bytes for source in sources)
    with new_folder(folder) as partial:
        _require_room(partial, size)
        for name, part in zip(names, parts, strict=True):
            write_tensors(partial / name, part)
        _write_json(partial / INDEX, _index(dict(zip(names, parts, strict=True)), size))
        _write_json(partial / CONFIG, _config(run, target_dtype, sources, tables))
        run.tokenizer.save(partial)
    return Export(str(folder), run.step, len(parts), len(sources), size)


def _sources(run: SavedRun, dtype: torch.dtype, shard_bytes: int) -> tuple[list[TensorSource], list[dict[str, Any]]]:
    """All tensors, and what the config says of the tables."""
    buffers, weights = run.model_buffers(), run.weights()
    kept = {name for name in weights if name in buffers or kind_of(name).part == "routers"}
    sources = [_weight(weights, name, None if name in kept else dtype) for name in sorted(weights)]
    tables, engram = run.tables(), run.job.model.engram
    if tables is None or engram is None:
        return sources, []
    compressed_V = compressed_vocabulary(run.job.model, RunTokens(run.tokenizer)).map
    sources.append(TensorSource.of(COMPRESSED_IDS, compressed_V))
    entries = []
    for module, layer in enumerate(engram.layers):
        parts = list(_table(tables, module, f"model.layers.{layer}.engram.table", dtype, shard_bytes))
        sources += parts
        shape = [tables.num_rows[module], tables.dim]
        entries.append({"layer": layer, "shape": shape, "tensors": [part.name for part in parts]})
    return sources, entries


def _weight(weights: SavedWeights, name: str, dtype: torch.dtype | None) -> TensorSource:
    """A weight, read as it is written; None keeps its dtype."""
    info = weights.info(name)
    dtype = dtype or info.dtype
    return TensorSource(name, dtype, info.shape, lambda: (values.to(dtype) for values in weights.pieces(name)))


def _table(tables: SavedTables, module: int, name: str, dtype: torch.dtype, shard_bytes: int) -> Iterator[TensorSource]:
    """A module's table, in ranges of rows that fit into a file."""
    rows_R = max(1, shard_bytes // (tables.dim * dtype.itemsize))
    for number, start in enumerate(range(0, tables.num_rows[module], rows_R)):
        end = min(start + rows_R, tables.num_rows[module])
        yield TensorSource(
            f"{name}.{number:05d}",
            dtype,
            (end - start, tables.dim),
            lambda start=start, end=end: _chunks(tables, module, start, end, dtype),  # type: ignore[misc]
        )


def _chunks(tables: SavedTables, module: int, start: int, end: int, dtype: torch.dtype) -> Iterator[Tensor]:
    step = max(1, _CHUNK_BYTES // tables.record_bytes)
    for first in range(start, end, step):
        yield tables.rows(module, torch.arange(first, min(first + step, end))).to(dtype)


def _index(parts: dict[str, list[TensorSource]], size: int) -> dict[str, Any]:
    weight_map = {source.name: name for name, part in parts.items() for source in part}
    return {"metadata": {"total_size": size}, "weight_map": weight_map}


def _config(
    run: SavedRun, dtype: torch.dtype, sources: list[TensorSource], tables: list[dict[str, Any]]
) -> dict[str, Any]:
    model, job = run.job.model, run.job
    engram = None
    if (addresses := run.image.manifest.addresses) is not None:
        engram = {"tables": tables, "compressed_ids": COMPRESSED_IDS, "addresses": addresses}
    return {
        "architectures": ["EngramForCausalLM"],
        "model_type": model.model_type,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_hidden_layers,
        "intermediate_size": model.dense_hidden_size,
        "num_attention_heads": model.attention.heads,
        "tie_word_embeddings": model.tie_embeddings,
        "n_routed_experts": model.n_routed_experts,
        "num_experts_per_tok": model.num_experts_per_tok,
        "max_position_embeddings": job.data.longest,
        "rope_theta": model.attention.rope_theta,
        "rope_scaling": _rope_scaling(model.attention.rope_scaling),
        "eos_token_id": run.tokenizer.eos_id,
        "pad_token_id": run.tokenizer.pad_id,
        "torch_dtype": _name(dtype),
        "training_step": run.step,
        "tokenizer_sha256": run.tokenizer.sha256,
        "model": model.model_dump(mode="json"),
        "engram": engram,
        "tensors": {source.name: {"shape": list(source.shape), "dtype": _name(source.dtype)} for source in sources},
    }


def _rope_scaling(scaling: RopeScalingConfig | None) -> dict[str, Any] | None:
    """YaRN under the names of Hugging Face's DeepSeek-V3."""
    if scaling is None:
        return None
    return {
        "type": "yarn",
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_length,
        "beta_slow": scaling.alpha,
        "beta_fast": scaling.beta,
        "mscale": scaling.mscale,
        "mscale_all_dim": scaling.mscale,
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _require_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise UserError(f"{folder.parent}: {size / 1e9:.1f} GB are needed, but {free / 1e9:.1f} GB are free")


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
