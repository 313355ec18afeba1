"""Small runs and their exports, each made once by a worker: one of every kind of model."""

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.command_line import JOB, train, write_job
from train.use.export import export
from train.use.saved_run import SavedRun

_MODEL = JOB["model"]
_YARN = {"factor": 4.0, "original_length": 8}
KINDS: dict[str, dict[str, Any]] = {
    "engram": {},
    "branched": {
        # Mappings that depend on the stream, and are far from the identity.
        "hyper_connections": {"expansion": 3, "alpha_init": 1.0},
        "tie_embeddings": True,
        "engram": _MODEL["engram"] | {"layers": [1], "orders": [2, 3, 4], "cross_documents": True},
        "attention": _MODEL["attention"] | {"q_lora_rank": 16, "rope_scaling": _YARN},
    },
    "plain": {
        "engram": None,
        "moe": _MODEL["moe"] | {"shared_experts": 1, "routed_scaling_factor": 1.5},
        "attention": _MODEL["attention"] | {"rope_scaling": _YARN},
    },
}


@dataclass(frozen=True)
class Exported:
    """A run and the folder that it was exported to."""

    run: Path
    folder: Path

    @cached_property
    def saved(self) -> SavedRun:
        return SavedRun.open(self.run)

    def load(self, **options: Any) -> Any:
        return load(self.folder, **options)

    @torch.no_grad()
    def logits(self, ids: list[int], positions: list[int] | None = None) -> Tensor:
        """Of training's forward, [T, V]."""
        tokens_BT = torch.tensor([ids])
        positions_BT = torch.tensor([positions or [*range(len(ids))]])
        tables = self.saved.tables()
        return self.saved.model()(tokens_BT, positions_BT, tables.look_up(tokens_BT, positions_BT) if tables else [])[0]


def load(folder: Path, **options: Any) -> Any:
    """A folder's model, as transformers loads it; the code that it brings is read anew."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


def make_run(kind: str, corpus: Path, folder: Path) -> Path:
    sections = {"train": {"steps": 4}, "optimizer": {"learning_rate": 0.01}, "offload": {"window_rows": 4000}}
    train(write_job(folder, corpus, model=KINDS[kind], **sections), "--nproc", "1")
    return folder / "runs" / "small"


def make_export(run: Path, folder: Path, **options: Any) -> Exported:
    shutil.rmtree(folder, ignore_errors=True)
    export(SavedRun.open(run), folder, **options)
    return Exported(run, folder)


@cache
def _kept_code() -> tempfile.TemporaryDirectory[str]:
    # One for the process: a package, once imported, is looked for where it was.
    return tempfile.TemporaryDirectory()


@contextmanager
def own_code_cache() -> Iterator[None]:
    """The library keeps the code that exports bring in no cache of the user's. Nothing is downloaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        import transformers.dynamic_module_utils

        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", _kept_code().name)
        yield


def module_of(model: Any) -> Any:
    """The file of the code that came with a model."""
    return sys.modules[type(model).__module__]
