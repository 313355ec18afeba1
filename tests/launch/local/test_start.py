import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.local.failures import RankFailed
from launch.local.start import run_ranks
from tests.launch.ranks import assert_gone, launcher, pids, program
from tests.signals import skip_if_ignored
from train.errors import UserError
from train.watch.ending import SAME_S

HANG = "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"


def test_ranks_know_who_they_are_and_where_they_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "99")
    command = program(tmp_path, "(folder / f'{rank}.json').write_text(json.dumps(dict(os.environ)))")
    run_ranks(command, 2, log_folder=tmp_path / "logs")
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert (first["RANK"], first["LOCAL_RANK"]) == ("0", "0")
    assert (second["RANK"], second["LOCAL_RANK"]) == ("1", "1")
    assert first["WORLD_SIZE"] == first["LOCAL_WORLD_SIZE"] == second["WORLD_SIZE"] == "2"
    assert first["MASTER_ADDR"] == "127.0.0.1"
    assert first["MASTER_PORT"] == second["MASTER_PORT"]
    assert first["DS_ACCELERATOR"] == "cpu"
    assert first["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 2))


def test_what_the_user_set_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    names = "OMP_NUM_THREADS", "MASTER_PORT", "DS_ACCELERATOR"
    command = program(tmp_path, f"(folder / 'out').write_text(' '.join(os.environ.get(name, '-') for name in {names}))")
    run_ranks(command, 1, log_folder=tmp_path / "logs", port=port, gpus=1)
    assert (tmp_path / "out").read_text() == f"7 {port} -"


def test_rank_0_is_shown_and_the_others_write_to_their_logs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = program(tmp_path, "print('out', rank); print('err', rank, file=sys.stderr)")
    for _ in range(2):
        run_ranks(command, 2, log_folder=tmp_path / "logs")
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("out 0\nout 0\n", "err 0\nerr 0\n")
    assert (tmp_path / "logs" / "rank1.log").read_text() == "out 1\nerr 1\n" * 2


def test_one_failing_rank_ends_a_hanging_one_and_its_children(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    child = "leave_pid(subprocess.Popen(['sleep', '60']).pid, f'child{rank}')"
    body = f"""
def body():
    {child}
    if rank == 0:
        {HANG}
    wait_for("child0.pid")
    raise RuntimeError("the table caught fire")
sys.exit(reported(body))
"""
    started = time.monotonic()
    with pytest.raises(RankFailed) as caught:
        run_ranks(program(tmp_path, body), 2, log_folder=tmp_path / "logs", grace_s=0.5)
    assert time.monotonic() - started < 15
    assert_gone(pids(tmp_path, 4), within_s=10)  # the kernel ends a killed child in its own time
    assert str(caught.value).startswith("rank 1 failed; its log: ")
    assert str(caught.value).endswith("RuntimeError: the table caught fire")
    assert capfd.readouterr().err == "", "the failure is told once, by whoever called"


def test_the_first_failure_is_told_and_not_the_lost_connections_that_follow(tmp_path: Path) -> None:
    body = """
def body():
    path = str(folder / "meet")
    if rank == 1:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path + ".part")
            server.listen()
            os.rename(path + ".part", path)
            server.accept()[0].close()
        time.sleep(0.5)
        raise RuntimeError("the real reason")
    wait_for("meet")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        client.recv(1)
    try:
        raise ConnectionResetError("peer is gone")
    except ConnectionResetError as error:
        raise RuntimeError("all_reduce failed") from error
sys.exit(reported(body))
"""
    with pytest.raises(RankFailed, match="the real reason"):
        run_ranks(program(tmp_path, body), 2, log_folder=tmp_path / "logs")


def test_ranks_that_a_signal_of_their_own_interrupts_are_no_failure(tmp_path: Path) -> None:
    body = """
from train.errors import Interrupted
def body():
    time.sleep(0.2 * rank)
    raise Interrupted("saved", 75)
sys.exit(reported(body))
"""
    assert run_ranks(program(tmp_path, body), 2, log_folder=tmp_path / "logs") == 75


def test_a_mistake_of_the_user_is_one_line_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    body = "def body(): raise UserError(f'window of {8} rows\\n is too small')\nsys.exit(reported(body))"
    with pytest.raises(UserError) as caught:
        run_ranks(program(tmp_path, body), 2, log_folder=tmp_path / "logs")
    assert str(caught.value) == "window of 8 rows is too small"
    assert capfd.readouterr() == ("", "")


def test_a_killed_rank_is_named_with_the_end_of_its_log(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "rank1.log"
    log.parent.mkdir()
    log.write_text("from an earlier run\n")
    body = """
def body():
    if rank == 1:
        print("allocating", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.2)
    raise RuntimeError("[pair.cc:534] Connection closed by peer [127.0.0.1]:1")
sys.exit(reported(body))
"""
    with pytest.raises(RankFailed) as caught:
        run_ranks(program(tmp_path, body), 2, log_folder=log.parent)
    assert str(caught.value) == (
        f"rank 1 was killed by SIGKILL: was the machine out of memory?; its log: {log}\nallocating"
    )


def test_what_a_successful_rank_left_running_is_ended(tmp_path: Path) -> None:
    body = "leave_pid(subprocess.Popen(['sleep', '60']).pid, f'child{rank}')"
    run_ranks(program(tmp_path, body), 2, log_folder=tmp_path / "logs")
    assert_gone(pids(tmp_path, 4), within_s=10)  # the kernel ends a killed child in its own time


def test_a_port_in_use_is_told_before_any_rank_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port}: already in use on this machine"):
            run_ranks(program(tmp_path, ""), 2, log_folder=tmp_path / "logs", port=port)
    assert list(tmp_path.glob("*.pid")) == []


def test_a_log_folder_that_cannot_be_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot create the folder"):
        run_ranks(program(tmp_path, ""), 1, log_folder=tmp_path / "file" / "logs")


def test_a_rank_that_cannot_start_leaves_no_other_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    popen = subprocess.Popen
    started: list[subprocess.Popen[bytes]] = []

    def second_fails(*args: object, **kwargs: object) -> subprocess.Popen[bytes]:
        if started:
            raise OSError("cannot fork")
        started.append(popen(*args, **kwargs))  # type: ignore[call-overload]
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", second_fails)
    with pytest.raises(OSError, match="cannot fork"):
        run_ranks(program(tmp_path, HANG), 2, log_folder=tmp_path / "logs")
    assert_gone([started[0].pid])


class TestSignals:
    """Of the launching process, which runs apart from this one."""

    @pytest.fixture(autouse=True)
    def _ended(self) -> Iterator[None]:
        self.process: subprocess.Popen[str] | None = None
        yield
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def launch(self, folder: Path, body: str, grace_s: float = 10.0) -> list[int]:
        command = launcher(program(folder, body), folder, 2, grace_s)
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        ranks = pids(folder, 2)
        while len(list(folder.glob("*.ready"))) < 2:
            time.sleep(0.01)
        return ranks

    READY = "(folder / f'{rank}.ready').touch(); time.sleep(60)"

    @pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
    def test_a_signal_asks_every_rank_to_end(self, signum: int, code: int, tmp_path: Path) -> None:
        skip_if_ignored(signum)
        body = f"""
def stop(number, frame):
    (folder / f"{{rank}}.asked").touch()
    sys.exit(3)
signal.signal(signal.SIGTERM, stop)
{self.READY}
"""
        ranks = self.launch(tmp_path, body)
        assert self.process is not None
        self.process.send_signal(signum)
        out, err = self.process.communicate(timeout=20)
        assert (self.process.returncode, out) == (code, "")
        assert err == f"stopped by {signal.Signals(signum).name}\n"
        assert all((tmp_path / f"{rank}.asked").exists() for rank in (0, 1))
        assert_gone(ranks)

    def test_a_rank_that_ignores_the_signal_is_killed_after_the_grace_time(self, tmp_path: Path) -> None:
        ranks = self.launch(tmp_path, f"signal.signal(signal.SIGTERM, signal.SIG_IGN)\n{self.READY}", grace_s=0.3)
        assert self.process is not None
        self.process.terminate()
        assert self.process.wait(timeout=10) == 143
        assert_gone(ranks)

    def test_a_later_ctrl_c_does_not_wait_and_nothing_else_hurries(self, tmp_path: Path) -> None:
        skip_if_ignored(signal.SIGINT)
        ranks = self.launch(tmp_path, f"signal.signal(signal.SIGTERM, signal.SIG_IGN)\n{self.READY}", grace_s=60)
        assert self.process is not None
        self.process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        self.process.send_signal(signal.SIGINT)  # the same one, as a terminal and a wrapper both send it
        time.sleep(SAME_S)
        self.process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            self.process.wait(timeout=1)
        self.process.send_signal(signal.SIGINT)
        assert self.process.wait(timeout=10) == 130
        assert_gone(ranks)

    @pytest.mark.parametrize("code", [0, 75])
    def test_ranks_that_save_and_end_give_their_exit_code(self, code: int, tmp_path: Path) -> None:
        body = f"""
from train.errors import Interrupted
asked = []
signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
def body():
    (folder / f"{{rank}}.ready").touch()
    while not asked:
        time.sleep(0.01)
    time.sleep(0.2 * rank)
    raise Interrupted("saved", {code})
sys.exit(reported(body))
"""
        self.launch(tmp_path, body)
        assert self.process is not None
        self.process.terminate()
        assert self.process.communicate(timeout=20) == ("", "")
        assert self.process.returncode == code

    def test_a_save_that_fails_is_told_although_a_signal_asked_for_it(self, tmp_path: Path) -> None:
        body = """
asked = []
signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
def body():
    (folder / f"{rank}.ready").touch()
    while not asked:
        time.sleep(0.01)
    raise UserError("no space left")
sys.exit(reported(body))
"""
        self.launch(tmp_path, body)
        assert self.process is not None
        self.process.terminate()
        _, err = self.process.communicate(timeout=20)
        assert self.process.returncode == 1
        assert err.endswith("UserError: no space left\n")

    def test_ranks_that_were_done_all_the_same_are_no_failure(self, tmp_path: Path) -> None:
        body = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n" + self.READY
        self.launch(tmp_path, body)
        assert self.process is not None
        self.process.terminate()
        assert self.process.wait(timeout=20) == 0

    def test_ranks_die_with_a_launcher_that_is_killed(self, tmp_path: Path) -> None:
        ranks = self.launch(tmp_path, self.READY)
        assert self.process is not None
        self.process.kill()
        assert_gone(ranks, within_s=10)
