import errno
from pathlib import Path

import pytest

from launch.local.environment import rank_count
from launch.local.failures import REPORT_FILE, RankReport, reported, user_message
from train.errors import UserError


def raising(error: BaseException) -> RankReport | int | None:
    def body() -> None:
        raise error

    return reported(body)


@pytest.mark.parametrize(
    ("error", "code", "kind"),
    [
        (UserError("no such key"), 2, "user"),
        (OSError(errno.ENOSPC, "No space left on device", "/data/x"), 2, "user"),
        (PermissionError(errno.EACCES, "Permission denied", "/data/x"), 2, "user"),
        (OSError(errno.EROFS, "Read-only file system", "/data/x"), 2, "user"),
        (PermissionError(errno.EACCES, "Permission denied"), 1, "crash"),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), 2, "user"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", b"/data/\xff"), 2, "user"),
        (OSError(errno.EIO, "Input/output error", "/data/x"), 2, "user"),
        (OSError(errno.ENODEV, "No such device"), 1, "crash"),
        (OSError("a bug"), 1, "crash"),
        (ValueError("a bug"), 1, "crash"),
        (ConnectionResetError("by peer"), 1, "peer"),
        (RuntimeError("[pair.cc] Connection closed by peer [127.0.0.1]"), 1, "peer"),
        (SystemExit(3), 3, None),
        (SystemExit("text"), 1, None),
        (SystemExit(), 0, None),
        (KeyboardInterrupt(), 130, None),
    ],
)
def test_every_failure_has_its_code_and_kind(
    error: BaseException, code: int, kind: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(REPORT_FILE, str(tmp_path / "report"))
    assert raising(error) == code
    report = RankReport.read(tmp_path / "report")
    assert (report and report.kind) == kind


@pytest.mark.parametrize(("rank", "printed"), [("0", 0), ("1", 1), (None, 1)])
def test_a_failure_is_printed_only_where_no_launcher_will_show_it(
    rank: str | None,
    printed: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RANK", rank or "0")
    if rank:
        monkeypatch.setenv(REPORT_FILE, str(tmp_path / "report"))
    raising(UserError("no such key"))
    assert capsys.readouterr().err == "Error: no such key\n" * printed


def test_a_crash_is_reported_with_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REPORT_FILE, str(tmp_path / "report"))
    raising(ZeroDivisionError("by zero"))
    report = RankReport.read(tmp_path / "report")
    assert report is not None
    assert "in raising" in report.text or "in body" in report.text
    assert report.text.endswith("ZeroDivisionError: by zero")


def test_a_difference_that_verify_mode_found_is_told_in_one_line_and_is_no_mistake_of_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from offload.verify.shadow import difference

    monkeypatch.setenv(REPORT_FILE, str(tmp_path / "report"))
    assert raising(difference("step 3, after its update", "row 7 (owner rank 1)", "version", 2, 3)) == 1
    report = RankReport.read(tmp_path / "report")
    assert report is not None
    assert report.text == ("offload.verify: step 3, after its update: row 7 (owner rank 1): version is 2 and must be 3")


def test_a_full_disk_is_told_with_the_place() -> None:
    error = OSError(errno.ENOSPC, "No space left on device", "/data/x")
    assert user_message(error) == "/data/x: no space left on device; make room, then run it again"
    assert user_message(PermissionError(errno.EACCES, "Permission denied")) is None


def test_what_to_do_about_a_path_follows_from_what_is_wrong_with_it() -> None:
    assert user_message(NotADirectoryError(errno.ENOTDIR, "Not a directory", "/data/x/y")) == (
        "/data/x/y: not a directory; move it away, or choose another path"
    )
    assert user_message(OSError(errno.EMFILE, "Too many open files", "/x")) == (
        "/x: too many open files; raise the limit of open files (ulimit -n), then run it again"
    )
    assert (
        user_message(OSError(errno.EFBIG, "File too large", "/x")) == "/x: file too large; check it, then run it again"
    )


@pytest.mark.parametrize(("wanted", "gpus", "count"), [(None, 0, 2), (None, 8, 8), (1, 8, 1), (4, 0, 4)])
def test_the_number_of_ranks(wanted: int | None, gpus: int, count: int) -> None:
    assert rank_count(wanted, gpus) == count


def test_more_ranks_than_gpus_are_refused() -> None:
    with pytest.raises(UserError, match=r"4 ranks on 2 GPU\(s\)"):
        rank_count(4, 2)
