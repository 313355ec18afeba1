import fcntl
import subprocess
import sys
import sysconfig
import threading
from multiprocessing import get_context
from pathlib import Path

import pytest

from tests.train.data.text import SENTENCES, small_tokenizer
from train.data.config import DataConfig
from train.data.open import open_data
from train.data.preparation.corpus import PythonCorpus, default_corpus
from train.data.preparation.sources import Report
from train.data.stores.store import TokenStore
from train.errors import UserError

TOPICS = "# generated\ntopics = {'b': 'second page', 'a': 'first '\n 'page'}\n"


@pytest.fixture
def library(tmp_path):
    root = tmp_path / "lib"
    files = {
        "json/decoder.py": SENTENCES[1] * 20,
        "abc.py": SENTENCES[2] * 20,
        "LICENSE.txt": "terms",
        "pydoc_data/topics.py": TOPICS,
        "test/test_abc.py": "no",
        "json/tests/x.py": "no",
        "site-packages/other.py": "no",
        "__pycache__/abc.py": "no",
        "encodings/cp037.py": '""" Python Character Mapping Codec generated with gencodec.py """',
        "_sysconfigdata__linux.py": "no",
        "config-3.11/makesetup.py": "no",
        "broken.py": b"\xff\xfe\xfd",
        "abc.so": "no",
    }
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


@pytest.fixture
def as_stdlib(library, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(library))
    return library


def test_chooses_sources_and_pages_in_a_fixed_order(library):
    report = Report()
    documents = list(PythonCorpus(library).documents(report))
    assert documents == ["terms", SENTENCES[2] * 20, SENTENCES[1] * 20, "first page", "second page"]
    assert (report.documents, report.bad) == (5, 1)
    assert report.bytes_read == PythonCorpus(library).total_bytes


def test_the_running_pythons_library_is_text_enough():
    corpus = PythonCorpus()
    report = Report()
    characters = sum(map(len, corpus.documents(report)))
    assert report.documents > 400
    assert characters > 5_000_000
    assert report.bad == 0
    assert not [name for name in corpus.files if "/test/" in name or "site-packages" in name]


def test_prepared_once_then_found(as_stdlib, tmp_path, monkeypatch):
    folder = default_corpus(tmp_path / "cache", bpe_vocab=270, progress=False)
    assert TokenStore.open(folder).num_documents == 5
    monkeypatch.setattr("train.data.preparation.corpus.build_store", None)
    assert default_corpus(tmp_path / "cache", bpe_vocab=270, progress=False) == folder


def test_other_text_vocabulary_or_tokenizer_is_another_folder(as_stdlib, tmp_path):
    cache = tmp_path / "cache"
    small_tokenizer().save(tmp_path)
    folders = [default_corpus(cache, bpe_vocab=vocab, progress=False) for vocab in (270, 280)]
    folders.append(default_corpus(cache, bpe_vocab=270, tokenizer=str(tmp_path), progress=False))
    (as_stdlib / "new.py").write_text("print()")
    folders.append(default_corpus(cache, bpe_vocab=270, progress=False))
    assert len(set(folders)) == 4
    assert TokenStore.open(folders[2]).tokenizer_sha256 == small_tokenizer().sha256


def _prepare(root, cache, queue):
    sysconfig.get_path = lambda name: root
    queue.put(str(default_corpus(cache, bpe_vocab=270, progress=False)))


def test_several_processes_at_once_end_with_one_good_store(library, tmp_path):
    context = get_context("spawn")
    queue = context.Queue()
    cache = tmp_path / "cache"
    children = [context.Process(target=_prepare, args=(str(library), cache, queue)) for _ in range(3)]
    for child in children:
        child.start()
    folders = {queue.get(timeout=30) for _ in children}
    for child in children:
        child.join()
        assert child.exitcode == 0
    (folder,) = folders
    assert TokenStore.open(folder).num_documents == 5
    assert sorted(path.name for path in cache.iterdir()) == sorted([".lock", Path(folder).name])


def test_who_waits_for_another_process_is_told_so(as_stdlib, tmp_path, capfd):
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        threading.Timer(0.3, fcntl.flock, (lock, fcntl.LOCK_UN)).start()
        found = default_corpus(tmp_path, bpe_vocab=270)
        assert f"waiting for another process, which prepares the corpus in {tmp_path}" in capfd.readouterr().err
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert default_corpus(tmp_path, bpe_vocab=270) == found  # what is there needs no lock


def test_open_data_prepares_the_default_and_opens_what_is_named(as_stdlib, tmp_path):
    config = DataConfig(cache=str(tmp_path / "cache"), bpe_vocab=270)
    store = open_data(config, progress=False)
    assert store.vocab_size == 270
    again = open_data(DataConfig(path=str(store.prefix.parent)))
    assert again.fingerprint == store.fingerprint
    small_tokenizer().save(tmp_path)
    with pytest.raises(UserError, match=r"drop data\.tokenizer"):
        open_data(DataConfig(path=str(store.prefix.parent), tokenizer=str(tmp_path)))


def test_damaged_cache_says_what_to_delete(as_stdlib, tmp_path):
    config = DataConfig(cache=str(tmp_path / "cache"), bpe_vocab=270)
    store = open_data(config, progress=False)
    (store.prefix.parent / "tokens.bin").write_bytes(b"")
    with pytest.raises(UserError, match=f"delete {store.prefix.parent}"):
        open_data(config, progress=False)


def test_nothing_to_prepare_or_nowhere_to_put_it(as_stdlib, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"data\.cache"):
        default_corpus(tmp_path / "file", bpe_vocab=270)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="no standard library sources"):
        default_corpus(tmp_path / "cache", bpe_vocab=270)


def test_preparing_needs_no_torch():
    # Worker processes import it; torch would cost each of them seconds.
    code = "import sys, train.data.open, train.data.preparation.encode; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[4])
