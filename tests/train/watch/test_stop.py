"""Signals that ask ranks to end: noted, agreed on, and when they end a rank at once."""

import os
import signal
import threading
import time

import torch.distributed as dist

import train.watch.stop
from tests.distributed import run_ranks
from train.watch.stop import StopSignals

GRACE_S = 1.5


def answers_of_two_ranks() -> tuple[list[int], bool]:
    """What a rank hears each time, while rank 1 gets a signal after two times; whether it was ended."""
    ended: list[tuple[str, int]] = []
    signals = StopSignals(60, lambda *told: ended.append(told))
    signals.listen()
    answers: list[int] = []
    while not answers or not answers[-1]:
        if dist.get_rank() == 1 and len(answers) == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.2)  # the thread hears it
        signals.ask(save=dist.get_rank() == 0 and len(answers) == 1)
        signum, save = signals.answer()
        assert save == (len(answers) == 1), "what one rank wants, all hear, once"
        answers.append(signum)
    return answers, bool(ended)


def test_what_one_rank_received_all_ranks_hear_in_the_same_step() -> None:
    heard = [0, 0, signal.SIGUSR1], False
    assert run_ranks(answers_of_two_ranks, 2) == [heard, heard]


def ending(later: int, grace_s: float) -> tuple[str, int, float]:
    """How, and how many seconds after SIGTERM, a rank ends to which `later` is sent at once and after a while."""
    train.watch.stop.SAME_S = 0.4
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is started with it ignored
    ended: list[tuple[str, int, float]] = []
    done = threading.Event()

    def leave(told: str, code: int) -> None:
        ended.append((told, code, time.monotonic() - sent))
        done.set()
        threading.Event().wait()  # as if the process had ended

    StopSignals(grace_s, leave).listen()
    sent = time.monotonic()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.1)
    os.kill(os.getpid(), later)
    time.sleep(0.5)
    os.kill(os.getpid(), later)
    assert done.wait(30)
    return ended[0]


def test_a_later_ctrl_c_ends_it_at_once() -> None:
    ((told, code, after_s),) = run_ranks(ending, 1, signal.SIGINT, 60.0)
    assert (told, code) == ("stopped by SIGINT, before what SIGTERM asked for was saved", 130)
    assert 0.55 < after_s < 60, "the first one counts as the same signal"


def test_a_later_sigterm_leaves_it_its_time_which_is_limited() -> None:
    ((told, code, after_s),) = run_ranks(ending, 1, signal.SIGTERM, GRACE_S)
    assert told.startswith("stopped by SIGTERM: 1.5 s were too short")
    assert told.endswith("raise checkpoint.grace_s")
    assert code == 143
    assert after_s >= GRACE_S
