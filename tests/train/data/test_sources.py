import json

import pytest

from train.data.sources import Report, Sources
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
        ([tmp_path], "no file in this folder"),
        ([tmp_path / "x.pdf"], "unknown kind"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            Sources(paths)
        assert "\n" not in str(caught.value)
