"""Writes checkpoints as the first format's writer did, from one of today's."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from train.checkpoint.saved_image import SavedImage


def write_format_1(image: SavedImage, folder: Path, ranks: int = 2) -> None:
    """The same image in the first format, with the rows spread over the files of `ranks` ranks."""
    folder.mkdir(parents=True)
    tensors: dict[str, list[torch.Tensor]] = {}
    for name, _, values in image.pieces(lambda *_: True):
        tensors.setdefault(name, []).append(values)
    whole = {name: torch.cat(parts).view(image.tensors[name].shape) for name, parts in tensors.items()}
    save_file(whole, folder / "backbone.safetensors")
    names = [f"tables-{rank:05d}-of-{ranks:05d}.safetensors" for rank in range(ranks)] if image.manifest.tables else []
    for rank, name in enumerate(names):
        chunks: dict[str, torch.Tensor] = {}
        for number, span in enumerate(image.spans[rank::ranks]):
            ids, records, _ = image.rows(span)
            chunks |= {f"ids.{number:06d}": ids, f"records.{number:06d}": records.contiguous()}
        save_file(chunks, folder / name)
    manifest = image.manifest
    state = {key: getattr(manifest, key) for key in ("step", "steps_applied", "model", "addresses", "data", "tables")}
    (folder / "state.json").write_text(json.dumps({"format": 1, **state, "table_files": names}, indent=1) + "\n")
