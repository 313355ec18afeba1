"""Stores by URL, from a server on the loopback interface that fails, in a cache that is too small for them."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.train.data.server import Server, serving
from tests.train.data.stores.test_shard_cache import bytes_in
from tests.train.data.text import SENTENCES, small_tokenizer
from train.data.batches import order
from train.data.batches.loader import Loader
from train.data.blend import Blend
from train.data.config import DataConfig
from train.data.preparation.prepare import prepare
from train.data.preparation.rewrite import merge
from train.data.remote import files as remote
from train.data.remote import retry
from train.data.stores import sums
from train.data.stores.examine import check, statistics
from train.data.stores.located import Elsewhere
from train.data.stores.store import TokenStore
from train.errors import UserError

pytest.importorskip("aiohttp", reason="needs aiohttp, which fsspec reads https:// with")

TOKENIZER = small_tokenizer()
SHARD = 128


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of some dozens of small shards."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in SENTENCES))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sums, "SHARD_BYTES", SHARD)
        prepare([folder / "texts.jsonl"], folder / "web", tokenizer=TOKENIZER, workers=1, progress=False)
    return folder / "web"


@pytest.fixture
def server(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(retry, "WAIT_S", 0.001)
    with serving() as served:
        serve(served, prepared, "web")
        yield served


def serve(server: Server, folder: Path, name: str) -> None:
    server.files.update({f"/{name}/{path.name}": path.read_bytes() for path in folder.iterdir()})


def small_bytes(folder: Path) -> int:
    """Of the files that are copied whole."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.name != "tokens.bin")


def how(folder: Path, prepared: Path, shards: int, patience_s: float = 5) -> Elsewhere:
    return Elsewhere(folder / "cache", small_bytes(prepared) + shards * SHARD + 20, patience_s)


def test_tokens_are_those_of_the_store_within_the_bound(server: Server, prepared: Path, tmp_path: Path) -> None:
    server.broken = lambda number: 50 if number % 4 == 3 else None
    local, place = TokenStore.open(prepared), how(tmp_path, prepared, 5, 60)
    found = TokenStore.open(f"{server.url}/web/", how=place)
    assert found.fingerprint == local.fingerprint
    assert found.tokenizer().sha256 == local.tokenizer_sha256
    assert np.array_equal(found.document_offsets, local.document_offsets)
    count, generator = local.num_tokens, np.random.default_rng(0)
    assert (found.num_tokens, found.tokens.dtype) == (count, local.tokens.dtype)
    assert count * local.tokens.itemsize > 30 * SHARD
    for _ in range(8):
        begin, end = sorted(generator.integers(0, count + 1, 2))
        assert np.array_equal(found.tokens[begin:end], local.tokens[begin:end])
        places = np.concatenate([np.arange(a, min(a + 7, count)) for a in generator.integers(0, count, 5)])
        assert np.array_equal(found.tokens[places], local.tokens[places])
        assert bytes_in(place.folder) <= place.limit
    assert not len(found.tokens[np.empty(0, np.int64)])
    assert statistics(found) == statistics(local)
    check(found)


def rows(loader: Loader, step: int) -> torch.Tensor:
    return torch.cat([torch.stack([b.tokens_BT, b.labels_BT, b.positions_BT]) for b in loader.batch(step)], dim=1)


def loaders(data: DataConfig, fetch_ahead: int = 0) -> list[Loader]:
    blend = Blend.open(data, 4)
    sizes = {"sequence_length": 16, "global_batch_size": 4, "micro_batch_size": 2, "seed": 3}
    return [
        Loader(blend.sources, split="train", phases=blend.phases, validation_fraction=0.2, fetch_ahead=fetch_ahead,
               best_fit=data.packing == "best_fit", shuffle_window=data.shuffle_window, **sizes,
               rank=rank, world_size=2)
        for rank in range(2)
    ]  # fmt: skip


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_batches_are_those_of_the_store(packing: str, server: Server, prepared: Path, tmp_path: Path) -> None:
    merge([TokenStore.open(prepared)] * 2, tmp_path / "other")
    phases = [{"after_steps": 3, "mix": f"1 {tmp_path / 'other'} 1 {{}}", "sequence_length": 24}]

    def data(web: str) -> DataConfig:
        mixed = [phase | {"mix": phase["mix"].format(web)} for phase in phases]
        place = {"cache": str(tmp_path), "cache_bytes": how(tmp_path, prepared, 9).limit}
        mix = f"3 {web} 1 {tmp_path / 'other'}"
        return DataConfig.model_validate({"mix": mix, "phases": mixed, "packing": packing, **place})

    remote, local = loaders(data(f"{server.url}/web"), fetch_ahead=3), loaders(data(str(prepared)))
    for step in (0, 1, 2, 3, 4, 5, 20, 1):
        for here, there in zip(local, remote, strict=True):
            assert torch.equal(rows(here, step), rows(there, step))
    assert local[0].identity() == remote[0].identity(), "a run could not go on with the same store elsewhere"
    assert bytes_in(tmp_path / "shards") <= how(tmp_path, prepared, 9).limit


def test_what_coming_steps_read_is_fetched_ahead(server: Server, prepared: Path, tmp_path: Path) -> None:
    data = DataConfig(path=f"{server.url}/web", cache=str(tmp_path), patience_s=0)
    (loader, _), (local, _) = loaders(data, fetch_ahead=2), loaders(DataConfig(path=str(prepared)))
    rows(loader, 0)
    sent = -1
    while sent != server.sent:
        sent = server.sent
        time.sleep(0.3)
    serve_nothing(server)
    for step in (1, 2):
        assert torch.equal(rows(loader, step), rows(local, step))
    with pytest.raises(UserError, match="shard"):
        [rows(loader, step) for step in range(3, 10)]


def serve_nothing(server: Server) -> None:
    server.broken = lambda number: 0


def test_a_server_that_fails_is_named_with_the_shard(
    server: Server, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = TokenStore.open(f"{server.url}/web", how=how(tmp_path, prepared, 5, 0.02))
    serve_nothing(server)
    url = f"{server.url}/web/tokens.bin"
    with pytest.raises(UserError, match=rf"{url}: shard 2 of \d+ \(bytes 128 to 256\): has failed for .*run the same"):
        store.tokens[SHARD // 2 : SHARD]
    assert f"{url}: shard 2 of " in capsys.readouterr().err
    server.broken = lambda number: None
    assert np.array_equal(store.tokens[SHARD // 2 : SHARD], TokenStore.open(prepared).tokens[SHARD // 2 : SHARD])
    del server.files["/web/tokens.bin"]
    with pytest.raises(UserError, match=rf"{url}: shard 4 of .*FileNotFoundError.*check the URL"):
        store.tokens[3 * SHARD // 2 : 2 * SHARD]


def test_a_server_that_falls_silent_is_asked_again(
    server: Server, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(remote, "_STALL_S", 0.2)
    store = TokenStore.open(f"{server.url}/web", how=how(tmp_path, prepared, 5))
    silent = server.gets + 1
    server.delay_s = lambda number: 1.0 if number == silent else 0.01
    assert np.array_equal(store.tokens[: 2 * SHARD], TokenStore.open(prepared).tokens[: 2 * SHARD])
    assert "Timeout" in (told := capsys.readouterr().err)
    assert "trying again in 0.001 s" in told


def test_what_is_damaged_is_never_used(server: Server, prepared: Path, tmp_path: Path) -> None:
    place = how(tmp_path, prepared, 5)
    store, local = TokenStore.open(f"{server.url}/web", how=place), TokenStore.open(prepared)
    first = store.tokens[: SHARD // 2]
    (kept,) = place.folder.rglob("*.shard")
    kept.write_bytes(bytes(SHARD))
    assert np.array_equal(store.tokens[: SHARD // 2], first)
    content = bytearray(server.files["/web/tokens.bin"])
    content[SHARD + 3] ^= 1
    server.files["/web/tokens.bin"] = bytes(content)
    with pytest.raises(UserError, match=r"shard 2 of .* came 3 times with another checksum .* upload it again"):
        store.tokens[SHARD // 2 : SHARD]
    assert np.array_equal(store.tokens[SHARD:], local.tokens[SHARD:])


def test_what_cannot_be_read_by_url_is_told(server: Server, prepared: Path, tmp_path: Path) -> None:
    def refused(match: str, place: Elsewhere | None = None, name: str = "web") -> None:
        with pytest.raises(UserError, match=match):
            TokenStore.open(f"{server.url}/{name}", how=place or how(tmp_path, prepared, 5))

    refused(rf"{server.url}/none/manifest.json: FileNotFound", name="none")
    refused(r"data.cache_bytes: in 300 bytes there is no room for .*tokens.idx", Elsewhere(tmp_path / "small", 300, 1))
    (tmp_path / "file").touch()
    refused(rf"data.cache {tmp_path}/file: cannot keep .*/web there", Elsewhere(tmp_path / "file", 10**6, 1))
    server.files["/web/tokens.idx"] += b"x"
    refused(rf"{server.url}/web/tokens.idx: is not what the manifest beside it describes")
    serve(server, prepared, "web")
    server.ranges = False
    refused(rf"{server.url}/web/tokens.bin: its server sends whole files only")
    server.ranges = True
    server.files["/web/tokens.bin"] = server.files["/web/tokens.bin"][:-2]
    refused(r"tokens.bin: \d+ bytes, its index implies \d+")
    manifest = json.loads(server.files["/web/manifest.json"])
    old = {key: value for key, value in manifest.items() if key not in ("shard_bytes", "sums_sha256")}
    server.files["/web/manifest.json"] = json.dumps(old).encode()
    refused("was prepared before stores had checksums of shards; write it anew with engram data merge")
    server.files["/web/manifest.json"] = b"{}"
    refused("not a token store's manifest")


def test_an_epoch_in_windows_fetches_each_shard_about_once(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(order, "PART_TOKENS", window := 4 * SHARD // 2)
    monkeypatch.setattr(sums, "SHARD_BYTES", SHARD)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"fox {n}"}) + "\n" for n in range(400)))
    store = tmp_path / "short"
    prepare([tmp_path / "texts.jsonl"], store, tokenizer=TOKENIZER, workers=1, progress=False)
    serve(server, store, "short")
    limit = how(tmp_path, store, 6).limit
    sent = {}
    for wanted in (window, None):
        data = {"path": f"{server.url}/short", "cache": str(tmp_path / str(wanted)), "cache_bytes": limit}
        both = loaders(DataConfig(**data, shuffle_window=wanted))
        before = server.sent
        for step in range(both[0].steps_per_epoch):
            for loader in both:
                rows(loader, step)
        sent[wanted] = server.sent - before
    size = len(server.files["/short/tokens.bin"])
    # A part is four shards here, and its last document reaches into the next.
    assert sent[window] < 1.5 * size
    assert sent[None] > 2 * size
