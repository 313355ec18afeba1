import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from train import files
from train.errors import UserError
from train.files import new_file, new_folder, require_regular


def names(path):
    return sorted(entry.name for entry in path.iterdir())


def test_appears_whole_at_the_end(tmp_path):
    target = tmp_path / "deep" / "out"
    with new_folder(target) as partial:
        (partial / "a").write_text("x")
        assert not target.exists()
        assert partial.parent == target.parent
    assert names(target) == ["a"]
    assert names(target.parent) == ["out"]
    assert target.stat().st_mode & 0o777 == tmp_path.joinpath("deep").stat().st_mode & 0o777


def _fail(_, error):
    raise error


def _build(target, content, beside):
    with new_folder(target) as partial:
        (partial / "a").write_text(content)
        (beside / "a").write_text("slow")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, UserError])
def test_error_leaves_what_was_there(tmp_path, error):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("x")
    with pytest.raises(error), new_folder(target, overwrite=True) as partial:
        _fail((partial / "new").write_text("x"), error)
    assert names(tmp_path) == ["out"]
    assert names(target) == ["old"]


@pytest.mark.parametrize("exchanged", [True, False])
def test_overwrite_replaces_everything(exchanged, tmp_path, monkeypatch):
    if not exchanged:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    for content in ("one", "two"):
        with new_folder(tmp_path / "out", overwrite=True) as partial:
            (partial / content).write_text("x")
    assert names(tmp_path / "out") == ["two"]
    assert names(tmp_path) == ["out"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it takes two renames")
def test_a_kill_at_any_moment_leaves_what_was_there_or_its_successor(tmp_path, monkeypatch):
    def replace(path, target):
        rename(path, target)
        assert (tmp_path / "out").is_dir()

    rename = Path.replace
    monkeypatch.setattr(Path, "replace", replace)
    _build(tmp_path / "out", "one", tmp_path)
    with new_folder(tmp_path / "out", overwrite=True) as partial:
        (partial / "two").write_text("x")
    assert names(tmp_path / "out") == ["two"]


def test_refuses_what_is_in_use_but_takes_an_empty_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as partial:
        (partial / "a").write_text("x")
    with pytest.raises(UserError, match="is not empty"), new_folder(tmp_path / "empty"):
        pass
    (tmp_path / "file").write_text("x")
    for target in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(UserError, match="file"), new_folder(target, overwrite=True):
            pass


def test_what_is_none_of_ours_is_never_replaced(tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(UserError, match=r"has no manifest\.json, so it is not replaced"):
        _build_like(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    _build_like(tmp_path)
    assert names(tmp_path) == ["manifest.json"]


def _build_like(target):
    with new_folder(target, overwrite=True, like="manifest.json") as partial:
        (partial / "manifest.json").write_text("new")


def test_of_two_at_once_the_first_to_end_wins_and_neither_removes_the_others_work(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(UserError, match="is not empty"), new_folder(target) as slow:
        _build(target, "quick", beside=slow)
    assert (target / "a").read_text() == "quick"
    assert names(tmp_path) == ["out"]


def test_abandoned_folders_are_removed_by_the_next(tmp_path):
    abandoned = tmp_path / ".out.partial-123"
    abandoned.mkdir()
    (abandoned / "tokens.bin").write_text("x")
    (tmp_path / ".outer.partial-123").mkdir()
    with new_folder(tmp_path / "out") as partial:
        (partial / "a").write_text("x")
    assert names(tmp_path) == [".outer.partial-123", "out"]


def test_a_folder_whose_process_lives_is_nobody_elses(tmp_path):
    with new_folder(tmp_path / "out", overwrite=True) as slow:
        with new_folder(tmp_path / "out", overwrite=True) as quick:
            (quick / "a").write_text("quick")
        (slow / "a").write_text("slow")
    assert (tmp_path / "out" / "a").read_text() == "slow"
    assert names(tmp_path) == ["out"]


def test_a_link_leads_to_the_folder_that_is_meant(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "out")
    for content in ("one", "two"):
        with new_folder(tmp_path / "link", overwrite=True) as partial:
            (partial / content).write_text("x")
            assert partial.parent == tmp_path / "disk"
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "disk" / "out") == ["two"]
    with pytest.raises(UserError, match="is not empty"), new_folder(tmp_path / "link"):
        pass


def test_a_mount_point_is_refused_before_anything_is_done(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: path == tmp_path / "out")
    with pytest.raises(UserError, match="is a mount point"), new_folder(tmp_path / "out"):
        raise AssertionError("work was begun")
    assert names(tmp_path) == ["out"]


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "a.json"
    with new_file(target) as partial:
        partial.write_text("one")
        assert not target.exists()
    with pytest.raises(KeyboardInterrupt), new_file(target) as partial:
        _fail(partial.write_text("tw"), KeyboardInterrupt)
    assert (target.read_text(), names(tmp_path)) == ("one", ["a.json"])


def test_a_link_to_a_file_stays_one(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "disk" / "real.json")
    for content in ("one", "two"):
        with new_file(tmp_path / "link.json") as partial:
            partial.write_text(content)
        assert (tmp_path / "link.json").is_symlink()
        assert (tmp_path / "disk" / "real.json").read_text() == content
    assert names(tmp_path) == ["disk", "link.json"]


def _in_mounts(script, folder):
    """Runs a script in a mount namespace of its own, where $D is an empty folder of a new tmpfs."""
    if os.getuid() or not shutil.which("unshare"):
        pytest.skip("needs root and unshare")
    setup = f"mount -t tmpfs tmpfs {folder} && export D={folder} && "
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", setup + script]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if "mount:" in result.stderr:
        pytest.skip(f"may not mount: {result.stderr.splitlines()[0]}")
    return result


_BUILD = f"""
{sys.executable} -c '
import sys
from pathlib import Path
from train.files import new_folder
with new_folder(Path(sys.argv[1]), overwrite=True) as partial:
    print("began")
    (partial / "new").write_text("x")
' """


def test_a_real_mount_point_is_refused_and_a_folder_in_it_is_made(tmp_path):
    made = _in_mounts(_BUILD + "$D/out; ls $D/out", tmp_path)
    assert made.stdout.split() == ["began", "new"], made.stderr
    refused = _in_mounts(_BUILD + "$D", tmp_path)
    assert "is a mount point" in refused.stderr
    assert "began" not in refused.stdout
    linked = _in_mounts("ln -s $D $D/link; " + _BUILD + "$D/link", tmp_path)
    assert "is a mount point" in linked.stderr


def test_a_folder_of_an_images_layer_is_replaced(tmp_path):
    overlay = "mkdir $D/low $D/up $D/work $D/all; mkdir $D/low/out; touch $D/low/out/old; "
    overlay += "mount -t overlay overlay -o lowerdir=$D/low,upperdir=$D/up,workdir=$D/work,redirect_dir=off $D/all; "
    made = _in_mounts(overlay + _BUILD + "$D/all/out; ls -A $D/all $D/all/out", tmp_path)
    assert made.returncode == 0, made.stderr
    assert made.stdout.split() == ["began", f"{tmp_path}/all:", "out", f"{tmp_path}/all/out:", "new"]


def test_pipes_and_devices_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(UserError, match="a pipe or device, not a file"):
            require_regular(path)
    for path in (tmp_path, tmp_path / "nothing", Path(__file__)):
        require_regular(path)
