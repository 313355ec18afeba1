"""A run read back computes what training computed, and says what is wrong where it cannot."""

import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from offload.rows.records import RecordLayout
from tests.command_line import engram, losses, table_rows, train, write_job
from train.data.open import open_data
from train.data.stores.store import TokenStore
from train.errors import UserError
from train.use.saved_run import SavedRun
from train.use.scoring import score

BRANCHED = {
    "model": {"hyper_connections": {"expansion": 2}, "tie_embeddings": True},
    "train": {"steps": 3, "dtype": "bf16"},
    "offload": {"row_dtype": "bf16", "exchange_dtype": "bf16"},
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def own_score(run: Path, step: int | None = None) -> float:
    saved = SavedRun.open(run, step)
    return score(saved, open_data(saved.job.data), split="validation", sequences=saved.job.eval.sequences).loss


def test_the_loss_is_that_of_training_bit_by_bit(trained: Path) -> None:
    """Six steps leave rows behind whose last update was earlier, rows never updated, and rows of two ranks' files."""
    assert own_score(trained) == losses(trained)[-1][1]
    assert own_score(trained, 3) > own_score(trained)


def test_bf16_branches_and_a_tied_head(corpus: Path, tmp_path: Path) -> None:
    job = write_job(tmp_path, corpus, **BRANCHED)
    train(job, "--nproc", "1")
    run = tmp_path / "runs" / "small"
    assert own_score(run) == losses(run)[-1][1]


def test_all_of_another_text(trained: Path, tmp_path: Path) -> None:
    text = "def f(x):\n    return x\n"
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(text * 4)
    prepared = engram("data", "prepare", tmp_path, "--out", tmp_path / "s", "--tokenizer", trained / "tokenizer.json")
    assert prepared.returncode == 0, prepared.stderr
    found = score(SavedRun.open(trained), TokenStore.open(tmp_path / "s"), split="all")
    assert 0.9 * 12 * len(text) < found.text_bytes < 12 * len(text)  # all but the documents' first tokens
    assert found.bits_per_byte == pytest.approx(found.loss * found.tokens / found.text_bytes / math.log(2))
    one_document = score(SavedRun.open(trained), TokenStore.open(tmp_path / "s"), split="validation")
    assert one_document.text_bytes == pytest.approx(found.text_bytes / 3, abs=4)


def test_rows_are_those_of_the_checkpoint_brought_up_to_date(trained: Path) -> None:
    saved = SavedRun.open(trained)
    tables = saved.tables()
    assert tables is not None
    engram = saved.job.model.engram
    layout = RecordLayout.of(engram.row_dim, saved.job.offload.optimizer)
    stored, start, stale = table_rows(trained), 0, 0
    for module, num_rows in enumerate(tables.num_rows):
        found = tables.rows(module, torch.arange(num_rows))
        picked = torch.tensor([0, 7, num_rows // 2, num_rows - 1])
        assert torch.equal(tables.rows(module, picked), found[picked])
        for row in range(num_rows):
            if record := stored.get(start + row):
                values = torch.frombuffer(bytearray(record), dtype=torch.float32)[None]
                current = int(layout.version(values)) == saved.step
                stale += not current
                assert torch.equal(found[row], layout.weights(values)[0]) == current
        start += num_rows
    assert stale > 10
    assert len(stored) < start


def test_no_deepspeed_is_loaded(trained: Path) -> None:
    code = (
        "import sys; from train.use.saved_run import SavedRun; "
        "run = SavedRun.open(sys.argv[1]); run.model(); run.tables();"
        "import train.use.export, train.use.scoring; sys.exit('deepspeed' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(trained)], check=True)


def test_a_run_without_its_data_has_its_tokenizer(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "copy"
    shutil.copytree(trained, run)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("prepared", "gone"))
    assert SavedRun.open(run).tokenizer.sha256 == SavedRun.open(trained).tokenizer.sha256
    assert SavedRun.open(run).tables() is not None


def test_a_tokenizer_that_was_changed_is_refused(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "copy"
    shutil.copytree(trained, run)
    path = run / "tokenizer.json"
    path.write_text(path.read_text().replace("<|pad|>", "<|filler|>"))
    with pytest.raises(UserError, match=r"tokenizer\.json: another tokenizer than the one that .* was trained with"):
        _ = SavedRun.open(run).tokenizer


def test_another_tokenizers_text_is_refused(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("something else altogether, " * 50)
    engram("data", "prepare", tmp_path / "text.txt", "--out", tmp_path / "store", "--train-bpe", "280")
    with pytest.raises(UserError, match="another tokenizer than the run's; prepare the text with"):
        score(SavedRun.open(trained), TokenStore.open(tmp_path / "store"), split="all")


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize("name", ["manifest.json", "rank-00001.json", "rank-00001-000000.safetensors"])
def test_damage_is_told_in_one_line(name: str, trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "copy"
    shutil.copytree(trained, run)
    damage(run / "checkpoints" / "step-00000006" / name)
    with pytest.raises(UserError, match=f"{name} .*; take another with --step"):
        own_score(run)
    assert own_score(run, 3) > 0


def test_changed_addresses_are_refused(trained: Path) -> None:
    saved = SavedRun.open(trained)
    assert saved.image.manifest.addresses is not None
    saved.image.manifest.addresses["multipliers"][0][0] += 2
    with pytest.raises(UserError, match="addresses come from another tokenizer"):
        saved.tables()


def test_no_such_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: Path) -> None:
    monkeypatch.chdir(trained.parents[1])
    assert SavedRun.open("small").step == 6
    with pytest.raises(UserError, match="none: not a run"):
        SavedRun.open("none")
    with pytest.raises(UserError, match="no checkpoint of step 2; there are: 3, 6"):
        SavedRun.open("small", 2)
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(UserError, match="no checkpoint yet"):
        SavedRun.open(tmp_path)
