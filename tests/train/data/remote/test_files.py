"""Sources by URL, from servers on the loopback interface that fail."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from tests.train.data.server import Server, serving
from tests.train.data.text import SENTENCES, small_tokenizer
from train.data.preparation import encode, unfinished
from train.data.preparation.prepare import prepare
from train.data.remote import files as remote
from train.data.remote import retry
from train.data.stores.located import Elsewhere
from train.data.stores.store import TokenStore
from train.errors import UserError

pytest.importorskip("aiohttp", reason="needs aiohttp, which fsspec reads https:// with")

TOKENIZER = small_tokenizer()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(retry, "WAIT_S", 0.001)
    with serving() as served:
        yield served


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}


def files_of(kind: str, folder: Path) -> bytes:
    """A file of the texts, of some kilobytes."""
    lines = "".join(json.dumps({"text": text}) + "\n" for text in SENTENCES * 20)
    if kind == "jsonl.gz":
        return gzip.compress(lines.encode(), 1)
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": SENTENCES * 20}), folder / "x.parquet")
        return (folder / "x.parquet").read_bytes()
    return lines.encode() if kind == "jsonl" else "".join(SENTENCES * 20).encode()


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "txt", "parquet"])
@pytest.mark.parametrize("ranges", [True, False])
def test_a_store_from_a_server_that_breaks_off_is_that_of_the_file(
    kind: str, ranges: bool, server: Server, tmp_path: Path
) -> None:
    content = files_of(kind, tmp_path)
    local = tmp_path / f"texts.{kind}"
    local.write_bytes(content)
    server.files[f"/texts.{kind}"], server.ranges = content, ranges
    server.broken = lambda number: 3 * len(content) // 4 if number % 3 == 1 else None
    prepare([local], tmp_path / "local", tokenizer=TOKENIZER, workers=1, progress=False)
    manifest = prepare(
        [f"{server.url}/texts.{kind}"], tmp_path / "remote", tokenizer=TOKENIZER, workers=1, progress=False, strict=True
    )
    assert contents(tmp_path / "remote") == contents(tmp_path / "local")
    assert manifest.sources == [f"{server.url}/texts.{kind}"]
    assert server.gets > 1


def test_a_preparation_goes_on_when_the_server_is_well_again(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(unfinished, "EVERY_S", 0.0)
    monkeypatch.setattr(encode, "_CHUNK_CHARS", 2000)
    content = files_of("jsonl", tmp_path)
    sources = [f"{server.url}/{name}.jsonl" for name in "abc"]
    server.files |= {f"/{name}.jsonl": content for name in "abc"}
    options = {"tokenizer": TOKENIZER, "workers": 1}
    prepare(sources, tmp_path / "whole", progress=False, **options)  # type: ignore[arg-type]
    seen = server.gets
    server.broken = lambda number: None if number <= seen + 2 else 0
    with pytest.raises(UserError, match=rf"source {sources[2]}: failed 6 times"):
        prepare(sources, tmp_path / "made", **options)  # type: ignore[arg-type]
    assert "is kept beside" in capfd.readouterr().err
    server.broken = lambda number: None
    asked = server.sent
    prepare(sources, tmp_path / "made", **options)  # type: ignore[arg-type]
    assert "going on after a break" in capfd.readouterr().err
    # The end of the second had not been tokenized yet.
    assert server.sent - asked == 2 * len(content), "the first file is read again"
    assert contents(tmp_path / "made") == contents(tmp_path / "whole")


def test_a_server_that_fails_for_good_is_named_and_nothing_is_left(server: Server, tmp_path: Path) -> None:
    server.files["/texts.jsonl"] = files_of("jsonl", tmp_path)
    server.broken = lambda number: 0
    with pytest.raises(UserError, match=rf"source {server.url}/texts.jsonl: failed 6 times in a row, at last with "):
        prepare([f"{server.url}/texts.jsonl"], tmp_path / "x", tokenizer=TOKENIZER, workers=1, progress=False)
    assert not (tmp_path / "x").exists()
    with pytest.raises(UserError, match=rf"source {server.url}/other.jsonl: FileNotFoundError"):
        prepare([f"{server.url}/other.jsonl"], tmp_path / "x", tokenizer=TOKENIZER, progress=False)


def test_a_file_that_changes_while_it_is_read_is_refused(server: Server, tmp_path: Path) -> None:
    content = server.files["/texts.jsonl"] = files_of("jsonl", tmp_path)

    def changed(number: int) -> int:
        server.files["/texts.jsonl"] = content + b"\n"
        return 100

    server.broken = changed
    with pytest.raises(UserError, match="has changed while it was read"):
        prepare([f"{server.url}/texts.jsonl"], tmp_path / "x", tokenizer=TOKENIZER, workers=1, progress=False)


def test_a_protocol_whose_library_is_missing_is_told() -> None:
    with pytest.raises(UserError, match=r"source nothing://bucket/x.jsonl: Protocol not known: nothing"):
        list(remote.remote_files("nothing://bucket/x.jsonl"))


def test_a_hub_s_url_is_resolved_by_its_library() -> None:
    fsspec = pytest.importorskip("fsspec")
    fs, path = fsspec.url_to_fs("hf://datasets/owner/name/data/train.parquet")
    assert type(fs).__name__ == "HfFileSystem"
    assert path == "datasets/owner/name/data/train.parquet"


def test_a_bucket_s_folder_is_read_file_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs", reason="needs s3fs")
    moto = pytest.importorskip("moto.server", reason="needs moto[server]")
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in {"ENDPOINT_URL": f"http://{host}:{port}", "ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "x",
                            "DEFAULT_REGION": "us-east-1"}.items():  # fmt: skip
            monkeypatch.setenv(f"AWS_{name}", value)
        import s3fs

        bucket = s3fs.S3FileSystem(skip_instance_cache=True)
        bucket.mkdir("texts")
        (tmp_path / "local").mkdir()
        for name in ("a.jsonl", "b.jsonl.gz"):
            content = files_of(name.partition(".")[2], tmp_path)
            (tmp_path / "local" / name).write_bytes(content)
            bucket.pipe_file(f"texts/web/{name}", content)
        bucket.pipe_file("texts/web/notes.csv", b"x")
        prepare([tmp_path / "local"], tmp_path / "one", tokenizer=TOKENIZER, workers=1, progress=False)
        made = prepare(["s3://texts/web"], tmp_path / "two", tokenizer=TOKENIZER, workers=1, progress=False)
        assert contents(tmp_path / "two") == contents(tmp_path / "one")
        assert made.passed_over == {".csv": 1}
        for path in (tmp_path / "two").iterdir():
            bucket.pipe_file(f"texts/store/{path.name}", path.read_bytes())
        store = TokenStore.open("s3://texts/store", how=Elsewhere(tmp_path / "cache"))
        assert np.array_equal(store.tokens[5:99], TokenStore.open(tmp_path / "one").tokens[5:99])
    finally:
        server.stop()
