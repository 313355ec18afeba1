"""Virtual time: host threads that really run, one at a time, and streams of a device that is not there.

A host thread runs Python in no time, and then works for as long as it is said to, or waits. When no thread has
anything to do at the present moment, time goes on to the next end of a piece of work. So whatever a thread asks, it
sees the state of this very moment: nothing that a later event would have changed.

Every piece of work is a span, and names the span whose end let it begin. Spans that cause each other leave no gap.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False)
class Span:
    """A piece of work of a stream or of a host thread; times in seconds.

    Attributes:
        where: the stream's or thread's name.
        what: kind of work.
        alone: how long it takes with nothing beside it.
        cause: what ended when this one began; None at the beginning of time.
        start, end: infinite until it has begun, and ended.
    """

    where: str
    what: str
    alone: float
    cause: "Span | None" = None
    start: float = float("inf")
    end: float = float("inf")
    left: float = 0.0
    before: list["Span"] = field(default_factory=list)
    sleepers: list["HostThread"] = field(default_factory=list)
    after: list["Span"] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return self.end < float("inf")


class HostThread:
    """A thread of the host.

    Attributes:
        name: of the thread.
        last: the span whose end brought the thread to the present moment.
    """

    def __init__(self, name: str, last: Span) -> None:
        self.name, self.last = name, last
        self.go = threading.Semaphore(0)
        self.seen = 0.0  # processor time that is accounted for
        self.current: Any = None  # stream


Rate = Callable[[Span, Sequence[Span]], float]
"""At which part of its speed a span proceeds beside all that proceed; the span is one of them."""


class Simulation:
    """Virtual time. The thread that makes it is the first host thread, `loop`.

    Args:
        rate: what work beside each other does to its speed.
        host_factor: seconds that a host thread works for each second of processor time that its Python takes here.
    """

    def __init__(self, rate: Rate = lambda _span, _all: 1.0, host_factor: float = 1.0) -> None:
        self.now = 0.0
        self._rate, self._host_factor = rate, host_factor
        self._running: list[Span] = []
        self._ready: deque[HostThread] = deque()
        self._mine = threading.local()
        self._main = HostThread("loop", Span("loop", "beginning", 0.0, None, 0.0, 0.0))
        self._stuck = False
        self._adopt(self._main)

    @property
    def thread(self) -> HostThread:
        """The calling thread."""
        thread: HostThread = self._mine.thread
        return thread

    def spawn(self, name: str, run: Callable[[], None]) -> threading.Thread:
        """A further host thread, which begins now."""
        thread = HostThread(name, self.thread.last)

        def live() -> None:
            thread.go.acquire()
            self._adopt(thread)
            run()
            self._next().go.release()

        self._ready.append(thread)
        real = threading.Thread(target=live, name=name, daemon=True)
        real.start()
        return real

    def charge(self) -> None:
        """The thread works for as long as its Python took since it was last asked."""
        self.compute(time.thread_time() - self.thread.seen)

    def compute(self, seconds: float) -> None:
        """The thread works on something that takes so much processor time here."""
        if self._host_factor * seconds > 0:
            self.work(self._host_factor * seconds, self.thread.name)

    @contextmanager
    def uncharged(self) -> Iterator[None]:
        """What is done inside takes no time: a GPU would do it, or it belongs to the emulation."""
        self.charge()
        yield
        self.thread.seen = time.thread_time()

    def work(self, seconds: float, what: str) -> None:
        """The calling thread works."""
        thread = self.thread
        span = Span(thread.name, what, seconds)
        span.sleepers.append(thread)
        self._begin(span, thread.last)
        self._pass_on(thread)

    def wait(self, span: Span) -> None:
        """The calling thread waits until a span has ended."""
        if not span.done:
            self.sleep(span.sleepers)

    def sleep(self, sleepers: list[HostThread]) -> None:
        """The calling thread sleeps until these are woken."""
        sleepers.append(self.thread)
        self._pass_on(self.thread)

    def wake(self, sleepers: list[HostThread], cause: Span | None = None) -> None:
        """These threads go on; by default because of what brought the calling thread here."""
        for thread in sleepers:
            thread.last = cause or self.thread.last
            self._ready.append(thread)
        sleepers.clear()

    def submit(self, span: Span, before: Sequence[Span]) -> None:
        """A span of the device, which begins when all those before it have ended."""
        span.before = [each for each in before if not each.done]
        for each in span.before:
            each.after.append(span)
        if not span.before:
            latest = max((each for each in before), key=lambda each: each.end, default=None)
            self._begin(span, latest if latest and latest.end == self.now else self.thread.last)

    def _begin(self, span: Span, cause: Span) -> None:
        assert cause.end == self.now, f"{span.what} begins at {self.now}, but its cause ended at {cause.end}"
        span.cause, span.start, span.left = cause, self.now, span.alone
        self._running.append(span)
        if span.alone <= 0:
            self._end(span)

    def _end(self, span: Span) -> None:
        self._running.remove(span)
        span.end = self.now
        self.wake(span.sleepers, span)
        for later in span.after:
            later.before.remove(span)
            if not later.before:
                self._begin(later, span)
        span.after.clear()

    def _pass_on(self, thread: HostThread) -> None:
        following = self._next()
        if following is not thread:
            following.go.release()
            thread.go.acquire()
        if self._stuck:
            raise RuntimeError("all threads wait, and nothing is at work")
        thread.seen = time.thread_time()

    def _next(self) -> HostThread:
        while not self._ready:
            if not self._running:
                self._stuck = True
                return self._main
            self._go_on()
        return self._ready.popleft()

    def _go_on(self) -> None:
        rates = [self._rate(span, self._running) for span in self._running]
        place = min(range(len(rates)), key=lambda each: self._running[each].left / rates[each])
        first = self._running[place]
        seconds = first.left / rates[place]
        self.now += seconds
        for span, rate in zip(self._running, rates, strict=True):
            span.left -= seconds * rate
        self._end(first)

    def _adopt(self, thread: HostThread) -> None:
        self._mine.thread = thread
        thread.seen = time.thread_time()
