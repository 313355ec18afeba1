import json
import os

import pytest

from train.data.preparation.sources import Report, Sources
from train.errors import UserError


def make(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": name}) if "jsonl" in name else name)


def test_folders_are_walked_in_sorted_order_whatever_the_file_system_gives(tmp_path, monkeypatch):
    make(tmp_path, "b/z.txt", "b/a.md", "a.txt", "c.jsonl", "b/skip.bin", ".git/x.txt", ".hidden.txt", "b/y.html")
    report = Report()
    sources = Sources([tmp_path])
    assert list(sources.documents(report)) == ["a.txt", "c.jsonl", "b/a.md", "b/z.txt"]
    assert report.bytes_read == sources.total_bytes == sum(f.stat().st_size for f in sources.files)
    assert list(sources.documents(Report())) == list(sources.documents(Report()))


def test_links_are_followed_once_and_what_is_passed_over_is_counted(tmp_path):
    corpus, other = tmp_path / "corpus", tmp_path / "other"
    make(corpus, "a.txt", "b.json", "c.CSV", "README", ".x/y.txt", "inner/d.txt")
    make(other, "e.txt")
    for link, target in (("f.txt", "a.txt"), ("inner/up", ".."), ("lost.txt", "nowhere"), ("other", other)):
        (corpus / link).symlink_to(target)
    os.mkfifo(corpus / "pipe.txt")
    sources = Sources([corpus])
    assert list(sources.documents(Report())) == ["a.txt", "a.txt", "inner/d.txt", "e.txt"]
    assert sources.passed_over == {
        ".csv": 1, ".json": 1, "broken links": 1, "folders read already": 1, "hidden": 1, "special files": 1,
        "without an ending": 1,
    }  # fmt: skip


def test_names_that_are_no_utf8_can_be_written(tmp_path):
    path = tmp_path / os.fsdecode(b"\xff.txt")
    path.write_text("x")
    assert Sources([path]).names == [f"{tmp_path}/\\xff.txt"]


def test_order_of_sources_is_the_callers(tmp_path):
    make(tmp_path, "a.txt", "b.txt")
    assert list(Sources([tmp_path / "b.txt", tmp_path / "a.txt"]).documents(Report())) == ["b.txt", "a.txt"]


def test_bad_places_are_counted_and_the_first_kept(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n' + "bad\n" * 20)
    report = Report()
    assert list(Sources([path]).documents(report)) == ["x"]
    assert (report.documents, report.bad, len(report.first_bad)) == (1, 20, 5)
    assert report.first_bad[0].where == f"{path}:2"


def test_strict_ends_at_the_first_bad_place(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\nbad\n')
    with pytest.raises(UserError, match=r"a\.jsonl:2: not JSON"):
        list(Sources([path], strict=True).documents(Report()))


def test_sources_that_give_nothing_are_refused(tmp_path):
    make(tmp_path, "x.pdf")
    for paths, message in (
        ([], "no source"),
        ([tmp_path / "none"], "no such file"),
        ([tmp_path], r"no file in this folder .*passed over: 1 \.pdf"),
        ([tmp_path / "x.pdf"], "unknown kind"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            Sources(paths)
        assert "\n" not in str(caught.value)
