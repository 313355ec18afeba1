"""A checkpoint of two ranks with a little of everything, made without any ranks."""

from pathlib import Path
from typing import Any

import torch

from train.checkpoint.checked import Damaged
from train.checkpoint.index import Save
from train.checkpoint.manifest import Manifest
from train.checkpoint.open import open_image
from train.checkpoint.parts import PartWriter

WORDS, APPLIED = 3, 5
SETTINGS = {"offload.optimizer.type": "sgd", "offload.row_dtype": "fp32", "model.engram.row_dim": 2}


def records(versions: list[int]) -> torch.Tensor:
    rows = torch.arange(len(versions) * WORDS, dtype=torch.float32).view(-1, WORDS).clone()
    rows.view(torch.int32)[:, -1] = torch.tensor(versions, dtype=torch.int32)
    return rows


def write(folder: Path, *, step: int = 4, nonce: str = "0a", **changes: Any) -> Path:
    """Writes a checkpoint of ranks 0 and 1; `changes` are made to its manifest."""
    path = folder / f"step-{step:08d}"
    path.mkdir(parents=True)
    weight = torch.arange(10.0) + step
    written = []
    for rank in range(2):
        with PartWriter(path, Save(step, nonce, rank, 2)) as writer:
            writer.add("weight/a", 5 * rank, weight[5 * rank : 5 * rank + 5])
            if rank == 0:
                writer.add("buffer/calls", 0, torch.tensor([step, 2]))
            writer.add_rows(torch.tensor([1, 4, 5]) + 10 * rank, records([1, step, APPLIED]))
            written.append(writer.finish())
    values: dict[str, Any] = {
        "step": step,
        "steps_applied": step,
        "nonce": nonce,
        "world_size": 2,
        "skipped_in_a_row": 0,
        "model": {},
        "addresses": {"primes": [[7, 9]]},
        "data": {},
        "tokenizer": "t",
        "data_changes": [],
        "tables": {"settings": SETTINGS, "learning_rates": [0.1] * max(APPLIED, step)},
        "tensors": {"weight/a": ("F32", [2, 5]), "buffer/calls": ("I64", [2])},
        "ranks": written,
    }
    manifest = Manifest(**values | changes)
    (path / "manifest.json").write_bytes(manifest.text())
    return path


def fault(path: Path) -> str | None:
    """What is wrong with a checkpoint, every byte of it read; None if it is whole."""
    try:
        image = open_image(path)
        image.check_files()
        return next(image.faults(), None)
    except Damaged as error:
        return str(error)
