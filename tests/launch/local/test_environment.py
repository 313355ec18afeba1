"""What a rank finds in its environment."""

import socket

import pytest

from launch.local import environment
from launch.local.environment import meeting_port, rank_environment


def test_cpu_ranks_keep_freed_memory_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MALLOC_MMAP_MAX_", raising=False)
    monkeypatch.setenv("MALLOC_TOP_PAD_", "7")
    environment = rank_environment(1, 2, 1234, gpus=0)
    assert environment["MALLOC_MMAP_MAX_"] == "0"
    assert environment["MALLOC_TOP_PAD_"] == "7"
    assert "MALLOC_MMAP_MAX_" not in rank_environment(1, 2, 1234, gpus=2)


def test_a_rank_knows_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "9")
    environment = rank_environment(1, 2, 1234, gpus=0)
    assert (environment["RANK"], environment["WORLD_SIZE"], environment["MASTER_PORT"]) == ("1", "2", "1234")


def test_a_port_is_one_that_no_connection_is_given_and_nobody_listens_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        assert all(15_000 <= meeting_port(None) < 32_000 for _ in range(20))
        with socket.create_server(("", meeting_port(None))) as free:
            monkeypatch.setattr(environment, "_UNASSIGNED", [port, free.getsockname()[1], (left := meeting_port(None))])
            assert meeting_port(None) == left
