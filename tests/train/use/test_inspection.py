"""What `engram inspect` tells of a token is what the model computes with it."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from model.engram import Engram
from tests.command_line import engram, newest
from train.config.file import load
from train.config.job import JobConfig
from train.errors import UserError
from train.use.inspection import Inspector
from train.use.saved_run import SavedRun
from train.use.usage import most_used

TEXT = "def find(self, name):\n    return self.find(self.name)\n"


@pytest.fixture(scope="module")
def inspector(trained: Path) -> Inspector:
    torch.set_num_threads(1)
    return Inspector(SavedRun.open(trained))


@pytest.fixture(scope="module")
def ids(inspector: Inspector) -> list[int]:
    return next(inspector.pieces(TEXT))


def next_shares(trained: Path, ids: list[int], *, memory: bool) -> list[float]:
    """Probabilities of a piece's tokens from the model's own forward; without memory its layers add nothing."""
    saved = SavedRun.open(trained)
    model, tables = saved.model(), saved.tables()
    assert tables is not None
    if not memory:
        for module in model.modules():
            if isinstance(module, Engram):
                module.forward = lambda hidden, *_: torch.zeros_like(hidden)  # type: ignore[method-assign]
    tokens_BT, positions_BT = torch.tensor([ids]), torch.arange(len(ids))[None]
    shares = model(tokens_BT, positions_BT, tables.look_up(tokens_BT, positions_BT))[0].softmax(-1)
    return [float(shares[at, token]) for at, token in enumerate(ids[1:])]


def test_predictions_are_the_models_with_the_memory_and_without(
    inspector: Inspector, ids: list[int], trained: Path
) -> None:
    *views, last = inspector.look(ids)
    for memory in (True, False):
        found = [view.next_with if memory else view.next_without for view in views]
        assert found == pytest.approx(next_shares(trained, ids, memory=memory), rel=1e-5)
    assert last.next_with is None
    assert [view.next_with for view in views] != pytest.approx([view.next_without for view in views], rel=1e-4)
    for layer in range(2):
        one_off = [view.layers[layer].next_without for view in views]
        assert one_off != pytest.approx([view.next_with for view in views], rel=1e-5)
        assert one_off != pytest.approx([view.next_without for view in views], rel=1e-5)
    assert [share for _, share in last.likeliest_with] == sorted((s for _, s in last.likeliest_with), reverse=True)


def test_gates_are_those_that_the_model_opened(inspector: Inspector, ids: list[int], trained: Path) -> None:
    model = SavedRun.open(trained).model()
    tables = SavedRun.open(trained).tables()
    assert tables is not None
    ratios: list[torch.Tensor] = []

    def note(module: Engram, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        # Without the convolution, what a layer adds is the gate times the value.
        plain, module.convolution = module.convolution, None
        value_BTD = module.value_proj(module._lookup(inputs[1], inputs[0]))  # type: ignore[arg-type]
        handle = hooks.pop(module)
        handle.remove()
        ratios.append((module(*inputs) / value_BTD.unsqueeze(2)).mean(-1)[0])
        module.convolution = plain

    hooks = {module: module.register_forward_hook(note) for module in model.modules() if isinstance(module, Engram)}
    tokens_BT, positions_BT = torch.tensor([ids]), torch.arange(len(ids))[None]
    model(tokens_BT, positions_BT, tables.look_up(tokens_BT, positions_BT))
    views = inspector.look(ids)
    for layer in range(2):
        found = torch.tensor([view.layers[layer].openings for view in views])
        assert torch.allclose(found, ratios[layer], rtol=1e-3)
        assert found.std() > 0.01


def test_rows_and_counts_are_the_checkpoints(inspector: Inspector, ids: list[int], trained: Path) -> None:
    saved: dict[int, int] = {}
    image = newest(trained)
    for span in image.spans:
        rows = image.rows(span)
        saved |= dict(zip(rows.ids_N.tolist(), rows.counts_N.tolist(), strict=True))
    counts, first = Counter[int](), [0, inspector._tables.num_rows[0]]
    for at, view in enumerate(inspector.look(ids)):
        for module, layer in enumerate(view.layers):
            assert [len(ngram.rows) for ngram in layer.ngrams] == [2, 2]
            assert layer.ngrams[0].text == inspector._text(ids[max(0, at - 1) : at + 1])
            for ngram in layer.ngrams:
                assert ngram.counts == [saved.get(first[module] + row, 0) for row in ngram.rows]
                counts.update(ngram.counts)
    assert len(counts) > 3, "hardly any row differs: the test would prove little"


def test_only_the_rows_that_are_looked_up_are_read(trained: Path, ids: list[int]) -> None:
    fresh = Inspector(SavedRun.open(trained))
    fresh.look(ids)
    assert fresh._tables.rows_read == sum(len(rows.unique()) for rows in fresh.rows_of(ids))


def test_the_most_used_rows_are_counted_over_all_pieces(inspector: Inspector) -> None:
    text = TEXT * 5
    pieces = list(inspector.pieces(text))
    assert len(pieces) > 1
    used = most_used(inspector, text, 3)
    assert [row.layer for row in used] == [0, 0, 0, 1, 1, 1]
    for module in range(2):
        lookups = Counter(row for ids in pieces for row in inspector.rows_of(ids)[module].flatten().tolist())
        mine = [row for row in used if row.layer == module]
        assert [row.lookups for row in mine] == [times for _, times in lookups.most_common(3)]
        assert all(row.lookups == lookups[row.row] == sum(times for _, times in row.ngrams) for row in mine)


def test_what_cannot_be_looked_into_is_told(trained: Path, inspector: Inspector) -> None:
    saved = SavedRun.open(trained)
    with pytest.raises(UserError, match="the text is empty"):
        list(inspector.pieces(""))
    job = load(trained / "config.yaml", ["model.engram=null"], JobConfig)
    manifest = type("Manifest", (), {"addresses": None, "tokenizer": None})
    plain = SavedRun(saved.folder, job, type("Image", (), {"path": saved.image.path, "manifest": manifest})())  # type: ignore[arg-type]
    with pytest.raises(UserError, match="has no memory to look into"):
        Inspector(plain)


def test_the_command(trained: Path, tmp_path: Path) -> None:
    result = engram("inspect", trained, "def find(", "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["step"] == 6
    assert "".join(token["text"] for token in found["tokens"]) == "def find("
    told = engram("inspect", trained, "def find(", COLUMNS="80").stdout
    assert "  without memory  " in told
    assert "  layer 1  gate 0." in told
    assert max(map(len, told.splitlines())) <= 80
    (tmp_path / "text").write_text(TEXT)
    top = engram("inspect", trained, "--file", tmp_path / "text", "--top", "2", COLUMNS="80")
    assert "n-grams behind it" in top.stdout, top.stderr
    assert max(map(len, top.stdout.splitlines())) <= 80
    (tmp_path / "text").write_bytes(b"\xff")
    assert engram("inspect", trained, "--file", tmp_path / "text").returncode == 2
