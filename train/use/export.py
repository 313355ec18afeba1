"""Writes a saved run as a folder that Hugging Face's transformers load, piece by piece. docs/serve.md has its files.

Shape suffixes: V vocabulary.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from model.parameters import kind_of
from train.checkpoint.saved_tables import SavedTables
from train.checkpoint.saved_weights import SavedWeights
from train.checkpoint.tensor_files import TensorSource, split, write_tensors
from train.errors import UserError
from train.files import new_folder
from train.huggingface.config import ENGRAM, deepseek_v3_config, engram_config, why_not_deepseek_v3
from train.huggingface.names import COMPRESSED_IDS, CONFIG, INDEX, TABLE_TENSOR, Part, published, table_files
from train.tables import compressed_vocabulary
from train.use.model_card import MODEL_CARD, model_card
from train.use.saved_run import DTYPES, RunTokens, SavedRun

SHARD_BYTES = 5 * 10**9
_CHUNK_BYTES = 64 << 20
"""Bytes of table rows that are in memory at a time."""
_CODE = ("configuration_engram.py", "modeling_engram.py")


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        folder: where.
        step: of the checkpoint.
        model_type: `deepseek_v3`, or `engram` with its own code.
        why: what of the model `deepseek_v3` cannot express; None if nothing.
        files, tensors, bytes: number of safetensors files, and of tensors in them, and bytes of these.
    """

    folder: str
    step: int
    model_type: str
    why: str | None
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
    backbone = list(split(_backbone(run, target_dtype), shard_bytes))
    names = [f"model-{number:05d}-of-{len(backbone):05d}.safetensors" for number in range(1, len(backbone) + 1)]
    parts = dict(zip(names, backbone, strict=True))
    index = _index(parts)
    config, tables = _config(run, target_dtype, shard_bytes)
    parts |= tables
    sources = [source for part in parts.values() for source in part]
    size = sum(source.bytes for source in sources)
    with new_folder(folder) as partial:
        _require_room(partial, size)
        for name, part in parts.items():
            (partial / name).parent.mkdir(exist_ok=True)
            write_tensors(partial / name, part)
        _write_json(partial / INDEX, index)
        _write_json(partial / CONFIG, config)
        _write_json(partial / "generation_config.json", _ends(run))
        run.tokenizer.save(partial)
        if config["model_type"] == ENGRAM:
            for name in _CODE:
                (partial / name).write_bytes((files("train.huggingface") / "exported" / name).read_bytes())
        (partial / MODEL_CARD).write_text(model_card(run, config, size), encoding="utf-8")
    why = why_not_deepseek_v3(run.job.model)
    return Export(str(folder), run.step, config["model_type"], why, len(parts), len(sources), size)


def _backbone(run: SavedRun, dtype: torch.dtype) -> Iterator[TensorSource]:
    """All tensors that the index has."""
    buffers, weights = run.model_buffers(), run.weights()
    for name in sorted(weights):
        info = weights.info(name)
        kept = name in buffers or kind_of(name).part == "routers"
        for part in published(name, info.shape):
            yield _weight(weights, name, part, info.dtype if kept else dtype)
    if run.job.model.engram is not None:
        compressed_V = compressed_vocabulary(run.job.model, RunTokens(run.tokenizer)).map
        yield TensorSource.of(COMPRESSED_IDS, compressed_V)


def _weight(weights: SavedWeights, name: str, part: Part, dtype: torch.dtype) -> TensorSource:
    """A part of a weight, read as it is written."""
    return TensorSource(
        part.name,
        dtype,
        part.shape,
        lambda: (values.to(dtype) for values in weights.pieces(name, part.start, part.size)),
    )


def _config(
    run: SavedRun, dtype: torch.dtype, shard_bytes: int
) -> tuple[dict[str, Any], dict[str, list[TensorSource]]]:
    """The config, and the tables' files."""
    model, longest = run.job.model, run.job.data.longest
    entries: list[dict[str, Any]] = []
    parts: dict[str, list[TensorSource]] = {}
    tables = run.tables()
    if tables is not None and model.engram is not None:
        for module, layer in enumerate(model.engram.layers):
            ranges = list(_ranges(tables, module, dtype, shard_bytes))
            names = table_files(layer, len(ranges))
            parts |= {name: [part] for name, part in zip(names, ranges, strict=True)}
            entries.append({"layer": layer, "rows": tables.num_rows[module], "files": names})
    if why_not_deepseek_v3(model) is None:
        config = deepseek_v3_config(model, longest)
    else:
        config = engram_config(model, longest, run.image.manifest.addresses, entries)
    told = {"step": run.step, "tokens": _tokens(run), "tokenizer_sha256": run.tokenizer.sha256}
    return {**config, **_ends(run), "torch_dtype": _name(dtype), "engram_pretrain": told}, parts


def _ranges(tables: SavedTables, module: int, dtype: torch.dtype, shard_bytes: int) -> Iterator[TensorSource]:
    """A module's table, in ranges of rows that fit into a file."""
    rows_R = max(1, shard_bytes // (tables.dim * dtype.itemsize))
    for start in range(0, tables.num_rows[module], rows_R):
        end = min(start + rows_R, tables.num_rows[module])
        yield TensorSource(
            TABLE_TENSOR,
            dtype,
            (end - start, tables.dim),
            lambda start=start, end=end: _chunks(tables, module, start, end, dtype),  # type: ignore[misc]
        )


def _chunks(tables: SavedTables, module: int, start: int, end: int, dtype: torch.dtype) -> Iterator[Tensor]:
    step = max(1, _CHUNK_BYTES // tables.record_bytes)
    for first in range(start, end, step):
        yield tables.rows(module, torch.arange(first, min(first + step, end))).to(dtype)


def _index(parts: dict[str, list[TensorSource]]) -> dict[str, Any]:
    size = sum(source.bytes for part in parts.values() for source in part)
    weight_map = {source.name: name for name, part in parts.items() for source in part}
    return {"metadata": {"total_size": size}, "weight_map": weight_map}


def _ends(run: SavedRun) -> dict[str, Any]:
    """The token that ends a document, and the one that pads; none begins one."""
    return {"bos_token_id": None, "eos_token_id": run.tokenizer.eos_id, "pad_token_id": run.tokenizer.pad_id}


def _tokens(run: SavedRun) -> int:
    return run.image.manifest.tokens_seen(run.job.model_dump(mode="json"))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _require_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise UserError(f"{folder.parent}: {size / 1e9:.1f} GB are needed, but {free / 1e9:.1f} GB are free")


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
