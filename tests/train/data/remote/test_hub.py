"""Tokenizers by hub name, from a server on the loopback interface that answers as the hub's resolver does."""

import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import huggingface_hub.utils._http
import pytest

from tests.command_line import ENGRAM
from tests.train.data.server import Server, serving
from tests.train.data.text import SENTENCES, small_tokenizer
from train.data.config import DataConfig
from train.data.remote.hub import is_hub_name
from train.data.stores.manifest import Manifest
from train.data.tokenization.tokenizer import Tokenizer
from train.errors import UserError


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A hub with one tokenizer, whose end-of-document token only its configuration names."""
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with serving() as served:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", served.url)
        template = huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", served.url)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        content = small_tokenizer().json.replace("<|endoftext|>", "<|stop|>").encode()
        config = json.dumps({"eos_token": {"content": "<|stop|>"}}).encode()
        for name, text in {"tokenizer.json": content, "tokenizer_config.json": config}.items():
            served.files[f"/owner/name/resolve/main/{name}"] = text
            served.files[f"/owner/bare/resolve/v1/{name}"] = text if name == "tokenizer.json" else b"{}"
        served.headers = {"X-Repo-Commit": hashlib.sha1(b"main").hexdigest()}
        yield served


def test_a_store_is_prepared_with_a_hub_s_tokenizer(hub: Server, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("".join(SENTENCES))
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "other"), "NO_PROXY": "*"}
    command = [*ENGRAM, "data", "prepare", "text.txt", "--out", "made", "--tokenizer", "owner/name"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "asking the hub for the tokenizer owner/name" in done.stderr
    manifest, tokenizer = Manifest.read(tmp_path / "made"), Tokenizer.load("owner/name")
    assert manifest.tokenizer == "owner/name"
    assert manifest.tokenizer_sha256 == tokenizer.sha256
    assert manifest.eos_id == tokenizer.eos_id == tokenizer.backend.token_to_id("<|stop|>")


def test_a_hub_that_fails_is_told_in_one_line(hub: Server) -> None:
    with pytest.raises(UserError, match=r"owner/bare@v1: no end-of-document token in the vocabulary"):
        Tokenizer.load("owner/bare@v1")
    with pytest.raises(
        UserError, match=rf"tokenizer owner/other: no such .* here, and {hub.url} answers 404 .*not there"
    ):
        Tokenizer.load("owner/other")
    found = Tokenizer.load("owner/name")
    hub.shutdown()
    hub.server_close()
    assert Tokenizer.load("owner/name").sha256 == found.sha256, "not taken from the library's cache"
    wanted = (
        rf"tokenizer owner/other: no such file or folder here, and {hub.url} cannot be reached \(.*refused.*\); give"
    )
    with pytest.raises(UserError, match=wanted) as raised:
        Tokenizer.load("owner/other")
    assert "\n" not in str(raised.value)


def test_what_is_here_is_no_hub_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_name("owner/name")
    assert is_hub_name("owner/name@refs/pr/1")
    assert DataConfig(tokenizer="owner/name").anchored().tokenizer == "owner/name"
    Path("owner/name").mkdir(parents=True)
    assert DataConfig(tokenizer="owner/name").anchored().tokenizer == str(tmp_path / "owner/name")
    for name in ("owner/name", "deepseek", "./owner/other", "/a/b", "a/b/c", "../b", "tokenizer.json"):
        assert not is_hub_name(name)
