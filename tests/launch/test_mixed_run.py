"""`engram train` on several sources, in phases."""

import json
import re
import sysconfig
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from tests.command_line import backbone, engram, losses, newest, table_rows, train, write_job
from tests.train.data.server import Server, serving
from tests.train.data.stores.test_shard_cache import bytes_in
from train.checkpoint.listing import checkpoints_in
from train.config.file import load
from train.config.job import JobConfig
from train.data.preparation.encode import Chunk
from train.data.preparation.rewrite import merge
from train.data.preparation.writer import StoreWriter
from train.data.stores import sums
from train.data.stores.shard_cache import ShardCache
from train.data.stores.store import TokenStore
from train.report.utilisation import ideal_s_per_token

MODULES = ("calendar", "cmd", "code", "codecs", "copy", "ctypes/util", "email/message", "fractions", "glob", "imaplib")


@pytest.fixture(scope="module")
def other(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second store, of the corpus's tokenizer."""
    folder, stdlib = tmp_path_factory.mktemp("other") / "mail", Path(sysconfig.get_path("stdlib"))
    sources = [stdlib / f"{name}.py" for name in MODULES]
    result = engram("data", "prepare", *sources, "--out", folder, "--tokenizer", corpus / "tokenizer.json")
    assert result.returncode == 0, result.stderr
    return folder


def phased(folder: Path, corpus: Path, other: Path) -> Path:
    """A job of five steps: three on one mixture, one on another, one on sequences of twice the length."""
    mix = [{"path": str(corpus), "weight": 3, "name": "library"}, {"path": str(other), "weight": 1}]
    second = {"after_steps": 3, "mix": [mix[0] | {"weight": 1}, mix[1] | {"weight": 3}]}
    path = write_job(folder, corpus, train={"micro_batch_size": 2}, checkpoint={"every": 2, "keep": 9})
    job = yaml.safe_load(path.read_text())
    phases = [second, {"after_tokens": 1024, "sequence_length": 64}]
    job["data"] |= {"path": None, "mix": mix, "phases": phases}
    path.write_text(yaml.safe_dump(job))
    return path


def served(server: Server, store: Path, folder: Path) -> str:
    """The URL of a store on a server, in shards of 4 KiB."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sums, "SHARD_BYTES", 4096)
        merge([TokenStore.open(store)], folder / "served" / store.name)
    server.files |= {
        f"/{store.name}/{file.name}": file.read_bytes() for file in (folder / "served" / store.name).iterdir()
    }
    server.broken = lambda number: 1000 if number % 50 == 49 else None
    return f"{server.url}/{store.name}"


@contextmanager
def watched(folder: Path) -> Iterator[list[int]]:
    """The bytes of a cache, from now to the end of the block, each time that nobody changes it."""
    cache, found, over = ShardCache(folder, 2**40), [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.01):
            with cache.alone(".lock"):
                found.append(bytes_in(folder))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        over.set()
        watcher.join()


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def check_records(found: list[dict[str, Any]], run: Path) -> None:
    """8 sequences a step, of two sources, the last step's twice as long."""
    assert [record["tokens"] for record in found] == [256, 512, 768, 1024, 1536]
    assert [record["tokens.library"] for record in found] == [192, 384, 576, 640, 768]
    assert [record["tokens.mail"] for record in found] == [64, 128, 192, 384, 768]
    assert all(record["epoch.mail"] > 0 for record in found)
    assert all(record["epoch"] == max(record["epoch.library"], record["epoch.mail"]) for record in found)
    for record in found[:4]:
        parts = record["loss.library"], record["loss.mail"]
        assert min(parts) < record["loss"] < max(parts)
    # Longer sequences take more operations a token.
    ideal_s = ideal_s_per_token(load(run / "config.yaml", [], JobConfig), torch.device("cpu"), 2)
    assert ideal_s is not None
    for record, length in zip(found, (32, 32, 32, 32, 64), strict=True):
        assert record["mfu"] == pytest.approx(record["tokens_per_s"] * ideal_s(length))
        assert 0 < record["gate.0.mean"] < 1
        assert 0 <= record["gate.1.open"] <= 1
    last = found[-1]
    assert last["val_loss"] == pytest.approx(0.75 * last["val_loss.library"] + 0.25 * last["val_loss.mail"])


def test_a_mixed_run_in_phases_and_how_it_may_be_changed(corpus: Path, other: Path, tmp_path: Path) -> None:
    job, runs = phased(tmp_path, corpus, other), tmp_path / "runs"
    told = train(job, "run.name=straight", "data.verify=true", "train.peak_tflops=0.001", "--nproc", "2")
    found, straight = records(runs / "straight"), runs / "straight"
    check_records(found, straight)
    last = found[-1]
    assert "phase 2 from step 4: library 25.0%, mail 75.0%, 32 tokens a sequence" in told.stdout
    assert "phase 3 from step 5: library 25.0%, mail 75.0%, 64 tokens a sequence" in told.stdout
    base = yaml.safe_load((straight / "base.yaml").read_text())
    assert base["name"] == str(job)
    assert base["values"]["data"]["phases"][1]["sequence_length"] == 64
    summary = json.loads((straight / "summary.json").read_text())
    assert summary["sources"]["mail"]["tokens"] == 768
    assert summary["sources"]["library"]["val_loss"] == last["val_loss.library"]
    assert summary["unigram_entropy"] > 0
    scored = json.loads(engram("eval", straight, "--sequences", "8", "--json").stdout)
    assert scored["loss"] == pytest.approx(last["val_loss"], rel=1e-6)
    assert scored["by_source"]["mail"]["loss"] == pytest.approx(last["val_loss.mail"], rel=1e-6)

    # Stopped after two steps and gone on from there, with a last phase that was to be another then, and from a server.
    train(job, "run.name=resumed", "train.steps=2", "data.phases=[{after_steps: 4, sequence_length: 16}]")
    with serving() as server, watched(tmp_path / "shards") as most:
        urls, limit = [served(server, store, tmp_path) for store in (corpus, other)], 140_000
        remote = tmp_path / "remote.yaml"
        remote.write_text(job.read_text().replace(str(corpus), urls[0]).replace(str(other), urls[1]))
        cache = f"data.cache={tmp_path}", f"data.cache_bytes={limit}"
        said = train(remote, "run.name=resumed", *cache, "--nproc", "2")
    assert limit // 2 < max(most) <= limit
    assert re.search(rf"{server.url}/(prepared|mail)/tokens.bin: shard \d+ of .*; trying again in 1 s", said.stderr)
    assert losses(runs / "resumed")[2:] == losses(straight)[2:]
    assert backbone(runs / "resumed") == backbone(straight)
    assert table_rows(runs / "resumed") == table_rows(straight)

    # What has begun stays as it is, unless it is overridden, which is recorded.
    refused = engram("train", job, "run.name=straight", "train.steps=6", "data.phases=[]")
    assert refused.returncode != 0
    assert "saved with another data.phases (" in refused.stderr
    assert "set data.allow_change=true to go on all the same" in refused.stderr
    refused = engram("train", job, "run.name=straight", "train.steps=6", f"data.mix=1 {other} 2 {corpus}")
    assert "saved with another data.mix (" in refused.stderr
    later = "data.phases=[{after_steps: 4, sequence_length: 64}]"
    whole = "deepspeed.zero_optimization.stage=3"
    train(job, "run.name=straight", "train.steps=6", later, "data.allow_change=true", whole, "--nproc", "2")
    under_zero_3 = records(straight)[-1]
    parts = under_zero_3["loss.library"], under_zero_3["loss.mail"]
    assert min(parts) < under_zero_3["loss"] < max(parts)
    (change,) = newest(straight).manifest.data_changes
    assert change["step"] == 5
    assert change["change"].startswith("data.phases (")
    assert len(checkpoints_in(straight / "checkpoints")) == 4


@pytest.mark.long
def test_a_compiled_mixed_run_has_the_losses_of_each_source(corpus: Path, other: Path, tmp_path: Path) -> None:
    job, runs = phased(tmp_path, corpus, other), tmp_path / "runs"
    for name, compiled in ("plain", "false"), ("compiled", "true"):
        train(job, f"run.name={name}", f"train.compile={compiled}", "offload.window_rows=4000", "--nproc", "1")
    keys = ["loss", "loss.library", "loss.mail", "val_loss.library", "val_loss.mail", "tokens.mail", "gate.0.mean"]
    for plain, compiled in zip(records(runs / "plain"), records(runs / "compiled"), strict=True):
        told = [key for key in keys if key in plain]
        assert len(told) >= 5
        assert [compiled[key] for key in told] == pytest.approx([plain[key] for key in told], rel=1e-4)


def test_data_verify_reads_all_of_the_text_before_the_first_step(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    with StoreWriter(tmp_path / "bad", TokenStore.open(corpus).tokenizer()) as writer:
        for ends in (True, True, False, True):
            tokens = np.full(600, 7, np.uint16)
            tokens[-1] = writer.tokenizer.eos_id if ends else 7
            writer.append(Chunk(tokens, np.array([600], np.int32), 0, 600))
        writer.finish(bad=0, passed_over={}, sources=["text"], options={})
    job = write_job(tmp_path, tmp_path / "bad", train={"steps": 1})
    refused = engram("train", job, "data.verify=true", "run.name=verified", "--nproc", "2")
    assert refused.returncode == 2
    assert refused.stderr.count("1 document(s) do not end with the end-of-document token") == 1
    assert "the first is number 3" in refused.stderr
    assert not (tmp_path / "runs" / "verified" / "metrics.jsonl").exists()
    train(job)
