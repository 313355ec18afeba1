"""Who has to come after which write-back, against a list of what has landed."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from offload.window.writebacks import WriteBacks

NUM_SLOTS = 6


@dataclass
class Copies:
    """A device that lands copies in their order, when it is told to; `log` holds what was asked of it."""

    landed: int = 0
    begun: int = 0
    log: list[tuple[str, int]] = field(default_factory=list)

    def copy(self) -> Any:
        self.begun += 1
        return _Copy(self, self.begun)


@dataclass
class _Copy:
    device: Copies
    number: int

    def done(self) -> bool:
        return self.number <= self.device.landed

    def order_fetches(self) -> None:
        self.device.log.append(("order", self.number))

    def wait(self) -> None:
        self.device.log.append(("wait", self.number))
        self.device.landed = max(self.device.landed, self.number)


slots = st.lists(st.integers(0, NUM_SLOTS - 1), unique=True, max_size=NUM_SLOTS).map(lambda some: np.array(some, int))
actions = st.one_of(st.tuples(st.just("begin"), slots), st.tuples(st.sampled_from(["order", "land", "ask"]), slots))


@given(st.lists(actions, max_size=40))
def test_the_last_copy_of_any_slot_is_that_which_the_device_lands_last(done: list[tuple[str, np.ndarray]]) -> None:
    device, writebacks = Copies(), WriteBacks(NUM_SLOTS)
    begun: list[np.ndarray] = []
    ordered = 0
    for action, some in done:
        if action == "begin":
            begun.append(some)
            writebacks.begin(some, device.copy())
        elif action == "order" and ordered < len(begun):
            assert np.array_equal(writebacks.order(), begun[ordered])
            ordered += 1
            assert device.log.pop() == ("order", ordered)
        elif action == "land":
            device.landed = min(device.landed + 1, len(begun))
        assert len(writebacks) == len(begun) - ordered
        assert writebacks.num_slots == sum(map(len, begun[ordered:]))
        assert writebacks.oldest_landed() == (ordered < min(device.landed, len(begun)))
        waiting = set(np.concatenate([*begun[ordered:], np.empty(0, int)]).tolist())
        mine = np.array([slot for slot in some if slot not in waiting], int)  # what the window asks for
        touching = [n for n, theirs in enumerate(begun, 1) if n <= ordered and np.isin(theirs, mine).any()]
        late = [n for n in touching if n > device.landed]
        last = writebacks.last_of(mine)
        assert (last.number if last else None) == (late[-1] if late else None)  # type: ignore[attr-defined]
    writebacks.land()
    assert not writebacks._ordered
    assert device.landed >= ordered
