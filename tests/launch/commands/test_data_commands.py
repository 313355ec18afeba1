"""`engram data merge | split | stats | verify | show`."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result

from tests.command_line import invoke
from tests.train.data.text import SENTENCES, small_tokenizer, write_pair
from train.data.preparation.encode import Chunk
from train.data.preparation.prepare import prepare
from train.data.preparation.writer import StoreWriter
from train.data.stores.manifest import Manifest
from train.data.stores.split import validation_mask
from train.data.stores.store import TokenStore

TOKENIZER = small_tokenizer()


def run(*arguments: object) -> Result:
    return invoke("data", *arguments)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources, each prepared, and both together; the second has a bad line, an empty text, and repeats itself."""
    folder = tmp_path_factory.mktemp("stores")
    lines = [json.dumps({"text": text}) for text in SENTENCES]
    (folder / "a.jsonl").write_text("\n".join(lines[:40]) + "\n")
    (folder / "b.jsonl").write_text("\n".join([*lines[40:], *lines[40:43], "broken", '{"text": ""}']) + "\n")
    for name, files in {"a": ["a"], "b": ["b"], "both": ["a", "b"]}.items():
        sources = [folder / f"{file}.jsonl" for file in files]
        prepare(sources, folder / name, tokenizer=TOKENIZER, progress=False)
    return folder


def test_merged_stores_are_what_their_sources_prepared_at_once_are(place: Path, tmp_path: Path) -> None:
    result = run("merge", place / "a", place / "b", "--out", tmp_path / "merged")
    assert result.exit_code == 0, result.output
    merged, both = Manifest.read(tmp_path / "merged"), Manifest.read(place / "both")
    assert merged.model_copy(update={"options": both.options}) == both
    assert (merged.bad, merged.empty) == (1, 1)
    TokenStore.open(tmp_path / "merged").verify()


def test_split_stores_have_the_documents_that_training_tells_apart(place: Path, tmp_path: Path) -> None:
    result = run("split", place / "both", "--held-out", tmp_path / "v", "--rest", tmp_path / "t", "--fraction", 0.2)
    assert result.exit_code == 0, result.output
    store, parts = TokenStore.open(place / "both"), [TokenStore.open(tmp_path / name) for name in "vt"]
    mask = validation_mask(np.diff(store.document_offsets), 0.2)
    assert 0 < mask.sum() < len(mask)
    of = np.repeat(mask, np.diff(store.document_offsets))
    for part, chosen in zip(parts, (of, ~of), strict=True):
        assert np.array_equal(part.tokens, store.tokens[chosen])
        assert part.manifest is not None
        assert part.manifest.text_bytes == part.manifest.token_bytes
    assert parts[0].num_documents == mask.sum()
    assert sum(part.manifest.text_bytes for part in parts) == store.manifest.text_bytes  # type: ignore[union-attr]


def test_stats_count_lengths_and_what_repeats(place: Path) -> None:
    store = TokenStore.open(place / "both")
    found = json.loads(run("stats", place / "both", "--json").stdout)
    lengths = np.diff(store.document_offsets)
    assert (found["documents"], found["tokens"]) == (63, store.num_tokens)
    assert found["text_bytes"] == store.manifest.text_bytes  # type: ignore[union-attr]
    assert found["duplicates"] == 3
    assert found["duplicate_tokens"] == lengths[-3:].sum()
    assert found["quantiles"]["0"] == lengths.min()
    assert found["quantiles"]["50"] == sorted(lengths)[31]
    for least, most, documents, tokens in found["histogram"]:
        mine = lengths[(lengths >= least) & (lengths <= most)]
        assert (documents, tokens) == (len(mine), mine.sum())
    assert sum(entry[2] for entry in found["histogram"]) == 63
    assert "3 documents equal an earlier one" in run("stats", place / "both").stdout


def test_lengths_are_drawn(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert run("stats", place / "a", "--plot", tmp_path / "lengths.png").exit_code == 0
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_verify_finds_a_document_without_its_end(tmp_path: Path) -> None:
    with StoreWriter(tmp_path, TOKENIZER) as writer:
        closed, open_ended = np.array([5, TOKENIZER.eos_id]), np.array([6, 7])
        tokens = np.concatenate([closed, open_ended]).astype(np.uint16)
        writer.append(Chunk(tokens, np.array([2, 2], np.int32), 0, 4))
        writer.finish(bad=0, passed_over={}, sources=["text"], options={})
    result = run("verify", tmp_path)
    assert result.exit_code != 0
    assert "1 document(s) do not end with the end-of-document token" in result.output
    assert "the first is number 2" in result.output


def test_verify_reads_every_byte(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "all as they were prepared" in run("verify", place / "a", place / "b").stdout
    run("merge", place / "a", "--out", tmp_path / "c")
    path = tmp_path / "c" / "tokens.bin"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    # As where the change lies between the blocks that are compared at every opening.
    sampled = Manifest.read(tmp_path / "c").sample_sha256
    monkeypatch.setattr("train.data.stores.store.sample_digest", lambda *files: sampled)
    result = run("verify", tmp_path / "c")
    assert result.exit_code != 0
    assert "tokens.bin: damaged, its checksum is not the manifest" in result.output


def test_a_document_is_shown_as_text(place: Path) -> None:
    assert run("show", place / "a", 2).stdout == SENTENCES[1] + "\n"
    ids = [*TOKENIZER.encode(SENTENCES[1]), TOKENIZER.eos_id]
    assert run("show", place / "a", 2, "--ids").stdout.split() == [str(each) for each in ids]
    assert "has 40 documents, there is no number 41" in run("show", place / "a", 41).output


def test_what_does_not_go_together_is_refused(place: Path, tmp_path: Path) -> None:
    prepare([place / "a.jsonl"], tmp_path / "other", train_bpe=270, progress=False)
    result = run("merge", place / "a", tmp_path / "other", "--out", tmp_path / "x")
    assert "made with another tokenizer than" in result.output
    assert not (tmp_path / "x").exists()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    result = run("split", place / "a", "--held-out", tmp_path / "v", "--rest", tmp_path / "used")
    assert result.exit_code != 0
    assert not (tmp_path / "v").exists()
    for rest in ("v", "v/t", "../" + tmp_path.name):
        result = run("split", place / "a", "--held-out", tmp_path / "v", "--rest", tmp_path / rest)
        assert "need folders of their own" in result.output
        assert not (tmp_path / "v").exists()
    result = run("split", place / "a", "--held-out", tmp_path / "v", "--rest", tmp_path / "t", "--fraction", "nan")
    assert "nan is no finite number." in result.output
    pair = write_pair(tmp_path / "one", [[5, 6, 0]])
    TOKENIZER.save(tmp_path)
    result = run("split", pair, "--held-out", tmp_path / "v", "--rest", tmp_path / "t", "--tokenizer", tmp_path)
    assert "leaves one side empty" in result.output
