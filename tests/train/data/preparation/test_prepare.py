import errno
import gzip
import itertools
import json
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import zstandard
from tokenizers import models, pre_tokenizers

from tests.signals import skip_if_ignored
from tests.train.data.text import SENTENCES, small_tokenizer
from train.data.preparation import encode, unfinished
from train.data.preparation import prepare as module
from train.data.preparation.prepare import prepare
from train.data.stores.manifest import Manifest
from train.data.stores.store import TokenStore
from train.data.tokenization.tokenizer import Tokenizer
from train.errors import UserError

TOKENIZER = small_tokenizer()


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in SENTENCES))
    return path


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_result_does_not_depend_on_the_number_of_processes(source, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "_CHUNK_CHARS", 500)
    for workers in (1, 2):
        prepare([source], tmp_path / str(workers), tokenizer=TOKENIZER, workers=workers, progress=False)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_a_long_document_is_tokenized_in_parts_and_its_tokens_are_those_of_the_whole(tmp_path, monkeypatch):
    # By these words white space has no tokens: neither a part of it alone, nor the document.
    words = tokenizers.Tokenizer(models.WordLevel({"<|endoftext|>": 0, "?": 1, "fox": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    texts = [SENTENCES[0], "fox " * 90 + " " * 90 + "dog", " " * 200, "".join(SENTENCES), "fox"]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for name, tokenizer in ("bpe", TOKENIZER), ("words", Tokenizer(words.to_str(), name="words")):
        made = {}
        for workers, chars in (1, 1 << 19), (1, 50), (2, 50):
            monkeypatch.setattr(encode, "_CHUNK_CHARS", chars)
            out = tmp_path / f"{name}-{workers}-{chars}"
            prepare([tmp_path / "text.jsonl"], out, tokenizer=tokenizer, workers=workers, progress=False)
            made[out] = contents(out)
        first, *others = made.values()
        assert others == [first] * 2
        assert max(len(text) for batch in encode.batches_of(texts, tokenizer) for text in encode.texts_of(batch)) < 250


def test_what_would_take_too_much_memory_is_a_bad_place(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(encode, "_CHUNK_CHARS", 50)
    monkeypatch.setattr(encode, "LONGEST_PART", 300)
    whole = tokenizers.Tokenizer.from_str(TOKENIZER.json)
    whole.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.UnicodeScripts(), whole.pre_tokenizer])
    texts = ["a first one", "fox " * 80, "between", "x" * 310, "", "last"]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    kept = {"parts": [0, 1, 2, 5], "whole": [0, 2, 5]}
    for name, tokenizer in ("parts", TOKENIZER), ("whole", Tokenizer(whole.to_str(), name="whole")):
        manifest = prepare([tmp_path / "text.jsonl"], tmp_path / name, tokenizer=tokenizer, workers=1)
        store = TokenStore.open(tmp_path / name)
        documents = np.split(store.tokens, store.document_offsets[1:-1])
        assert [tokenizer.decode(each.tolist()) for each in documents] == [texts[number] for number in kept[name]]
        assert (manifest.bad, manifest.empty) == (len(texts) - 1 - len(kept[name]), 1)
        with pytest.raises(UserError, match=r"text.jsonl, entry \d: .*split it.*--strict"):
            prepare([tmp_path / "text.jsonl"], tmp_path / "no", tokenizer=tokenizer, strict=True, progress=False)
    told = capfd.readouterr().err
    assert "text.jsonl, entry 4: 310 characters, and this tokenizer can cut it nowhere" in told
    assert "text.jsonl, entry 4: 310 characters, and this tokenizer needs texts whole" in told, (
        "one before it is counted"
    )
    assert "text.jsonl, entry 2: 320 characters, and this tokenizer needs texts whole" in told


def test_manifest_tells_what_is_there(source, tmp_path):
    with source.open("a") as stream:
        stream.write('broken\n{"text": ""}\n')
    manifest = prepare([source], tmp_path / "out", tokenizer=TOKENIZER, progress=False)
    store = TokenStore.open(tmp_path / "out")
    assert store.manifest == manifest
    assert (manifest.documents, manifest.bad, manifest.empty) == (len(SENTENCES), 1, 1)
    assert manifest.tokens == store.num_tokens == sum(len(TOKENIZER.encode(text)) + 1 for text in SENTENCES)
    assert manifest.text_bytes == manifest.token_bytes == sum(len(text.encode()) for text in SENTENCES)
    assert manifest.tokenizer_sha256 == TOKENIZER.sha256
    assert manifest.sources == [str(source)]


def test_what_is_passed_over_is_told_and_in_the_manifest(source, tmp_path, capfd):
    (tmp_path / "notes.json").write_text("{}")
    (tmp_path / os.fsdecode(b"\xff.csv")).write_text("")
    manifest = prepare([tmp_path], tmp_path / "out", tokenizer=TOKENIZER)
    assert manifest.passed_over == {".csv": 1, ".json": 1}
    assert Manifest.read(tmp_path / "out") == manifest
    assert "(passed over: 1 .csv, 1 .json)" in capfd.readouterr().err


def test_a_bpe_that_is_smaller_than_asked_for_is_told(source, tmp_path, capfd):
    manifest = prepare([source], tmp_path / "out", train_bpe=100_000)
    assert manifest.tokenizer == f"bpe-{manifest.vocab_size}"
    assert f"the text gives a vocabulary of {manifest.vocab_size} entries only" in capfd.readouterr().err


def test_signals_are_heard_while_this_process_tokenizes(source, tmp_path, monkeypatch):
    # Python handles them on the main thread, and not while that is in the library.
    on_main, work = [], encode.encode_chunk

    def seen(*arguments):
        on_main.append(threading.current_thread() is threading.main_thread())
        return work(*arguments)

    monkeypatch.setattr(encode, "encode_chunk", seen)
    prepare([source], tmp_path / "out", tokenizer=TOKENIZER, workers=1, progress=False)
    assert on_main == [False]


def test_fingerprint_follows_text_and_boundaries_not_packaging(source, tmp_path):
    packed = tmp_path / "text.jsonl.gz"
    packed.write_bytes(gzip.compress(source.read_bytes()))
    changed = tmp_path / "changed.jsonl"
    changed.write_text(source.read_text().replace("lazy", "idle", 1))
    prints = {}
    for name, path in (("a", source), ("b", packed), ("c", changed)):
        prints[name] = prepare([path], tmp_path / name, tokenizer=TOKENIZER, progress=False).fingerprint
    prints["d"] = prepare([source], tmp_path / "d", train_bpe=290, progress=False).fingerprint
    assert prints["a"] == prints["b"]
    assert len(set(prints.values())) == 3


def test_trains_a_bpe_on_the_text_itself(source, tmp_path):
    manifest = prepare([source], tmp_path / "out", train_bpe=300, progress=False)
    assert (manifest.vocab_size, manifest.tokenizer_sha256) == (300, TOKENIZER.sha256)


def test_strict_and_not(source, tmp_path, capfd):
    with source.open("a") as stream:
        stream.write("broken\n")
    with pytest.raises(UserError, match=f"text.jsonl:{len(SENTENCES) + 1}: not JSON"):
        prepare([source], tmp_path / "out", tokenizer=TOKENIZER, strict=True, progress=False)
    assert not (tmp_path / "out").exists()
    prepare([source], tmp_path / "out", tokenizer=TOKENIZER)
    shown = capfd.readouterr().err
    assert f"1 bad line(s) or file(s) skipped; the first: {source}:{len(SENTENCES) + 1}: not JSON" in shown
    assert "prepared 60 documents" in shown


def test_errors_are_one_line_and_leave_nothing(source, tmp_path):
    empty, bad = tmp_path / "empty.txt", tmp_path / "bad.jsonl"
    empty.write_text("")
    bad.write_text('{"body": "x"}\n' * 3)
    before = sorted(tmp_path.iterdir())
    for sources, options, message in (
        ([empty], {"tokenizer": TOKENIZER}, "no document with text"),
        ([empty], {"train_bpe": 300}, "no document with text"),
        ([bad], {"tokenizer": TOKENIZER}, "3 bad, the first: .*no field 'text' .its fields: body"),
        ([source], {}, "either a tokenizer"),
        ([source], {"tokenizer": TOKENIZER, "train_bpe": 300}, "either a tokenizer"),
        ([source], {"tokenizer": "missing.json"}, "cannot read"),
        ([source], {"train_bpe": 100}, "at least 258"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            prepare(sources, tmp_path / "out", progress=False, **options)
        assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


def test_a_source_is_never_replaced_by_what_is_made_of_it(source, tmp_path):
    for out in (tmp_path, tmp_path / "link"):
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(tmp_path)
        with pytest.raises(UserError, match="holds the source"):
            prepare([source], out, train_bpe=290, overwrite=True, progress=False)
    assert source.exists()


def test_where_no_folder_can_be_made_nothing_waits_for_ever(source, tmp_path):
    for out, told in (("/proc/x", "/proc/x: cannot be created"), ("", "has an empty name")):
        with pytest.raises(UserError, match=told):
            prepare([source], out, train_bpe=290, progress=False)
    with pytest.raises(UserError, match="BPE vocabulary 10000001: at most 10000000 is possible"):
        prepare([source], tmp_path / "o", train_bpe=10_000_001, progress=False)


def test_refuses_to_overwrite_unless_told(source, tmp_path):
    out = tmp_path / "out"
    first = prepare([source], out, tokenizer=TOKENIZER, progress=False)
    with pytest.raises(UserError, match="is not empty"):
        prepare([source], out, train_bpe=290, progress=False)
    assert TokenStore.open(out).fingerprint == first.fingerprint
    prepare([source], out, train_bpe=290, overwrite=True, progress=False)
    assert TokenStore.open(out).vocab_size == 290


def test_full_disk_is_told_in_one_line(source, tmp_path, monkeypatch):
    def full(self, chunk):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module.StoreWriter, "append", full)
    with pytest.raises(UserError, match="no room on the disk"):
        prepare([source], tmp_path / "out", tokenizer=TOKENIZER, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["text.jsonl"]


def test_memory_is_bounded_by_the_chunks_in_flight(monkeypatch):
    monkeypatch.setattr(encode, "_CHUNK_CHARS", 10)
    ahead = 0

    def texts():
        nonlocal ahead
        for i in range(100):
            ahead += 1
            yield f"text number {i}"

    for chunk in encode.encode_stream(TOKENIZER, texts(), 2):
        ahead -= len(chunk.lengths)
        assert ahead <= 6
        time.sleep(0.001)


def test_killed_worker_is_told_in_one_line(monkeypatch):
    monkeypatch.setattr(encode, "_encode_in_worker", _die)
    with pytest.raises(UserError, match="fewer workers"):
        list(encode.encode_stream(TOKENIZER, SENTENCES, 2))


def _die(texts):
    os._exit(9)


def test_text_is_not_lost_by_normalising_tokenizers(tmp_path):
    entries = json.loads(TOKENIZER.json)
    entries["normalizer"] = {"type": "Lowercase"}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(entries))
    (tmp_path / "a.txt").write_text("İSTANBUL " * 20)
    manifest = prepare([tmp_path / "a.txt"], tmp_path / "out", tokenizer=str(path), progress=False)
    assert manifest.text_bytes == 10 * 20 != manifest.token_bytes
    store = TokenStore.open(tmp_path / "out")
    assert store.bytes_of(np.asarray(store.tokens, dtype=np.int64)) == pytest.approx(manifest.text_bytes)


def test_closing_the_stream_ends_the_processes_before_their_work_is_done():
    before = {*multiprocessing.active_children()}
    stream = encode.encode_stream(TOKENIZER, itertools.repeat("the quick brown fox\n" * 1000), 2)
    next(stream)
    workers = {*multiprocessing.active_children()} - before
    assert workers
    stream.close()
    assert [worker.exitcode for worker in workers] == [-signal.SIGKILL] * len(workers)


def test_a_process_that_is_ended_while_it_sends_a_result_is_not_waited_for(monkeypatch):
    def keep(*args):
        pools.append(ProcessPoolExecutor(*args))
        return pools[0]

    pools = []
    monkeypatch.setattr(encode, "ProcessPoolExecutor", keep)
    stream = encode.encode_stream(TOKENIZER, itertools.repeat("the quick brown fox\n" * 1000), 2)
    next(stream)
    while not pools[0]._result_queue.empty():
        time.sleep(0.01)
    for worker in pools[0]._processes.values():
        os.kill(worker.pid, signal.SIGSTOP)
    os.write(pools[0]._result_queue._writer.fileno(), struct.pack("!i", 1000))  # of a message of 1,000 bytes, no more
    closing = threading.Thread(target=stream.close, daemon=True)
    closing.start()
    closing.join(20)
    assert not closing.is_alive()


CHILD = """
import sys
from train.data.stores.manifest import Manifest
from train.data.preparation.prepare import prepare

if __name__ == "__main__":
    prepare([sys.argv[1]], sys.argv[2], tokenizer=sys.argv[3], workers=2)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_interrupted_run_leaves_nothing_that_looks_complete_and_no_processes(tmp_path, how):
    if how != signal.SIGKILL:
        skip_if_ignored(how)
    TOKENIZER.save(tmp_path)
    source, script, out = tmp_path / "long.jsonl.zst", tmp_path / "child.py", tmp_path / "out"
    script.write_text(CHILD)
    # Minutes of tokenization in a small file.
    line = json.dumps({"text": "the quick brown fox\n" * 1000}) + "\n"
    source.write_bytes(zstandard.compress(line.encode() * 100) * 1000)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[4])}
    command = [sys.executable, script, source, out, tmp_path / "tokenizer.json"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as child:
        try:
            while not any(path.stat().st_size for path in tmp_path.glob(".out.partial-*/tokens.bin")):
                assert child.poll() is None
                time.sleep(0.02)
            workers = [int(pid) for pid in Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()]
            assert len(workers) >= 2
            child.send_signal(how)
            child.wait(timeout=20)
        finally:
            child.kill()
    assert child.returncode == (-signal.SIGINT if how == signal.SIGINT else -signal.SIGKILL)
    assert not out.exists()
    deadline = time.monotonic() + 10
    while any(_alive(pid) for pid in workers):
        assert time.monotonic() < deadline, "workers outlive the preparation"
        time.sleep(0.05)
    left = list(tmp_path.glob(".out.partial-*"))
    assert len(left) == 2 * (how == signal.SIGKILL), "a folder and its lock"
    assert not any((path / "manifest.json").exists() for path in left)
    (tmp_path / "short.txt").write_text("the end")
    prepare([tmp_path / "short.txt"], out, tokenizer=TOKENIZER, progress=False)
    assert TokenStore.open(out).num_documents == 1
    assert not list(tmp_path.glob(".out.partial-*"))


def _alive(pid):
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


class Broken(Exception): ...


def _breaking_at_the_fourth():
    work, turn = encode.encode_chunk, itertools.count()

    def breaking(*arguments):
        if next(turn) == 3:
            raise Broken
        return work(*arguments)

    return breaking


TOO_LONG = json.dumps({"text": "x" * 1500})


@pytest.mark.parametrize("tokenizer", [{"tokenizer": TOKENIZER}, {"train_bpe": 280}])
def test_a_preparation_goes_on_after_a_break(tokenizer, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(unfinished, "EVERY_S", 0.0)
    monkeypatch.setattr(encode, "_CHUNK_CHARS", 300)
    monkeypatch.setattr(encode, "LONGEST_PART", 1000)
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(4):
        lines = [json.dumps({"text": text}) for text in (*SENTENCES[15 * number : 15 * number + 15], "")]
        (texts / f"{number}.jsonl").write_text(
            "\n".join([*lines[:9], "broken", *lines[9:-1], TOO_LONG, lines[-1]]) + "\n"
        )
    options = {**tokenizer, "workers": 1}
    whole = prepare([texts], tmp_path / "whole", progress=False, **options)
    encoded, trained = [], []
    work, training = encode.encode_chunk, module.train_bpe_on

    def breaking(*arguments):
        encoded.append(len(arguments[1]))
        if len(encoded) in stops:
            raise Broken
        return work(*arguments)

    monkeypatch.setattr(encode, "encode_chunk", breaking)
    monkeypatch.setattr(module, "train_bpe_on", lambda *some: trained.append(1) or training(*some))
    # In the first file, in the third one, and again at the same place.
    for stops in ({2}, {14}, {1}, set()):
        encoded.clear()
        if stops:
            with pytest.raises(Broken):
                prepare([texts], tmp_path / "out", progress=False, **options)
            assert not (tmp_path / "out").exists()
        else:
            made = prepare([texts], tmp_path / "out", **options)
    assert made == whole
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    said = capfd.readouterr().err
    assert "going on after a break: " in said
    assert "8 bad line(s) or file(s) skipped; the first: " in said
    assert f"{texts}/0.jsonl:10" in said
    assert sum(encoded) < 40, "what was done before is done again"
    assert len(trained) == ("train_bpe" in tokenizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "texts", "whole"]


KILLED = """
import os, signal, sys
from train.data.preparation import encode, unfinished
from train.data.preparation.prepare import prepare

unfinished.EVERY_S, encode._CHUNK_CHARS = 0.0, 300
write, records = unfinished.Unfinished.write, int(sys.argv[4])


def last_words(self, folder):
    global records
    write(self, folder)
    records -= 1
    if not records:
        os.kill(os.getpid(), signal.SIGKILL)


unfinished.Unfinished.write = last_words
prepare([sys.argv[1]], sys.argv[2], tokenizer=sys.argv[3], workers=1, progress=False)
"""


@pytest.mark.parametrize("records", [2, *(pytest.param(count, marks=pytest.mark.long) for count in (1, 7))])
def test_a_preparation_killed_right_after_a_record_goes_on_to_an_equal_store(records, source, tmp_path, capfd):
    TOKENIZER.save(tmp_path)
    command = [sys.executable, "-c", KILLED, source, tmp_path / "out", tmp_path / "tokenizer.json", str(records)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[4])}
    for _ in range(2):  # the second goes on from the first, and is killed as well
        assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    options = {"tokenizer": str(tmp_path / "tokenizer.json"), "workers": 1}
    made = prepare([source], tmp_path / "out", **options)
    assert "going on after a break: " in capfd.readouterr().err
    whole = prepare([source], tmp_path / "whole", progress=False, **options)
    assert made == whole
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_broken_preparation_of_other_text_is_not_gone_on_with(source, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(unfinished, "EVERY_S", 0.0)
    monkeypatch.setattr(encode, "_CHUNK_CHARS", 300)
    for change in ("text", "options", "tokenizer", "file", "limit"):
        with monkeypatch.context() as patch:
            patch.setattr(encode, "encode_chunk", _breaking_at_the_fourth())
            with pytest.raises(Broken):
                prepare([source], tmp_path / "out", tokenizer=TOKENIZER, workers=1, overwrite=True, progress=False)
        (left,) = tmp_path.glob(".out.partial-*/unfinished.json")
        options = {"tokenizer": TOKENIZER, "overwrite": True}
        if change == "text":
            os.utime(source, ns=(0, 0))
        elif change == "options":
            options["document_chars"] = 5000
        elif change == "tokenizer":
            options["tokenizer"] = small_tokenizer(280)
        elif change == "limit":
            monkeypatch.setattr(module, "LONGEST_PART", 1 << 20)
        else:
            left.with_name("lengths.part").unlink()
        made = prepare([source], tmp_path / "out", workers=1, **options)
        assert made.documents == len(SENTENCES)
        assert "going on" not in capfd.readouterr().err
        TokenStore.open(tmp_path / "out").verify()


def test_a_record_goes_when_what_it_describes_is_overwritten(source, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "_CHUNK_CHARS", 300)
    prepare([source], tmp_path / "whole", tokenizer=TOKENIZER, workers=1, progress=False)
    for every_s, tokenizer in ((0.0, TOKENIZER), (1000.0, small_tokenizer(280))):
        with monkeypatch.context() as patch:
            patch.setattr(unfinished, "EVERY_S", every_s)
            patch.setattr(encode, "encode_chunk", _breaking_at_the_fourth())
            with pytest.raises(Broken):
                prepare([source], tmp_path / "out", tokenizer=tokenizer, workers=1, progress=False)
    prepare([source], tmp_path / "out", tokenizer=TOKENIZER, workers=1, progress=False)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
