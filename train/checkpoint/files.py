"""The files of a checkpoint; see `train.checkpoint` for what is in them.

Whatever is wrong with a file becomes one of two errors: `Damaged` when it is read, OSError when it is written.
"""

import errno
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from offload.tables import EngramTables

if TYPE_CHECKING:
    from train.engine import EngineState

STATE_FILE = "state.json"
BACKBONE_FILE = "backbone.safetensors"
_STATE_KEYS = {"format", "step", "steps_applied", "model", "addresses", "data", "tables", "table_files"}
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


class Damaged(Exception):
    """A file of a checkpoint is missing, cut short, or not what its name says."""


def write_state(folder: Path, description: dict[str, Any]) -> None:
    """Writes `state.json`."""
    (folder / STATE_FILE).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")


def read_state(folder: Path) -> dict[str, Any]:
    """Reads `state.json`.

    Raises:
        Damaged: it cannot be read, or is another program's.
    """
    with _reading(folder / STATE_FILE):
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    if not isinstance(state, dict) or not state.keys() >= _STATE_KEYS:
        raise Damaged(f"{STATE_FILE} is not that of a checkpoint")
    return state


def save_backbone(folder: Path, state: "EngineState") -> None:
    """Writes an engine's tensors.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    tensors = {f"{slot}/{name}": value for name, slots in state.parameters.items() for slot, value in slots.items()}
    tensors |= {f"buffer/{name}": value.contiguous() for name, value in state.buffers.items()}
    _save(tensors, folder / BACKBONE_FILE)


def load_backbone(folder: Path, steps: int) -> "EngineState":
    """Reads an engine's tensors; `steps` is how many it had applied.

    Raises:
        Damaged: the file cannot be read.
    """
    from train.engine import EngineState  # loads DeepSpeed, which a reader of weights alone does not need

    state = EngineState(steps)
    with _reading(folder / BACKBONE_FILE):
        tensors = load_file(folder / BACKBONE_FILE)
    for key, value in tensors.items():
        slot, _, name = key.partition("/")
        if slot == "buffer":
            state.buffers[name] = value
        else:
            state.parameters.setdefault(name, {})[slot] = value
    return state


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Reads the fp32 weights and the buffers alone, by name; memory-mapped, so they are read when they are used.

    Raises:
        Damaged: the file cannot be read.
    """
    with _reading(folder / BACKBONE_FILE), safe_open(folder / BACKBONE_FILE, framework="pt") as file:
        keys = [key.partition("/") for key in file.keys()]  # noqa: SIM118
        return {name: file.get_tensor(f"{slot}/{name}") for slot, _, name in keys if slot in ("weight", "buffer")}


def tables_file(rank: int, ranks: int) -> str:
    """Name of a rank's file of rows."""
    return f"tables-{rank:05d}-of-{ranks:05d}.safetensors"


def save_tables(tables: EngramTables, path: Path) -> None:
    """Writes this rank's rows that were ever updated, with their job-wide ids.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    chunks: dict[str, torch.Tensor] = {}
    for number, (ids, records) in enumerate(tables.updated_rows()):
        chunks |= {f"ids.{number:06d}": ids, f"records.{number:06d}": records.contiguous()}
    _save(chunks, path)


def load_tables(tables: EngramTables, path: Path) -> None:
    """Takes those of a file's rows that this rank owns.

    Raises:
        Damaged: the file cannot be read.
    """
    with _reading(path), safe_open(path, framework="pt") as file:
        for key in sorted(name for name in file.keys() if name.startswith("ids.")):  # noqa: SIM118
            tables.load_rows(file.get_tensor(key), file.get_tensor(key.replace("ids.", "records.")))


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        # The library tells of the system's error in words alone.
        number = _OS_ERROR.search(str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error), str(path)) from None


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise Damaged(f"{path.name} is missing") from None
    except (OSError, SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise Damaged(f"{path.name} cannot be read ({error})") from None
