"""Which ranks of a run give signs of life, as far as their heartbeats can be seen from here."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from train.watch.heartbeat import HEARTBEATS, SLOWEST_BEAT_S, Beat, beat_path

SILENT_S = 4 * SLOWEST_BEAT_S
"""Time without a heartbeat after which a rank counts as gone."""
_SETTLE_S = 2 * SLOWEST_BEAT_S
_AGAIN_S = 0.5


@dataclass(frozen=True)
class Life:
    """A rank's last beat, seconds since then, and whether that is too long."""

    beat: Beat
    age_s: float
    silent: bool


class Pulse:
    """Looks at heartbeats again and again. One that changes between two looks is a sign of life, whatever clocks say.

    Args:
        folder: of the run.
        now, monotonic: clocks, in seconds: since 1970, and of no matter when.
    """

    def __init__(
        self, folder: Path, now: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._folder, self._now, self._monotonic = folder, now, monotonic
        self._seen: dict[int, tuple[Beat, float]] = {}  # and when it was written, by our monotonic clock

    def look(self, ranks: int | None = None) -> list[Life]:
        """The ranks that have beaten since their start, by number; the first so many if `ranks` is given."""
        paths = sorted((self._folder / HEARTBEATS).glob("rank-*.json"))
        if ranks is not None:
            wanted = {beat_path(self._folder, rank) for rank in range(ranks)}
            paths = [path for path in paths if path in wanted]
        return [self._life(beat) for path in paths if path.stat().st_size and (beat := Beat.read(path))]

    def look_well(self, ranks: int | None = None, sleep: Callable[[float], None] = time.sleep) -> list[Life]:
        """The same, but who seems silent is given the time of two beats: the clock of its host may be wrong."""
        deadline = self._monotonic() + _SETTLE_S
        found = self.look(ranks)
        while any(life.silent for life in found) and self._monotonic() < deadline:
            sleep(_AGAIN_S)
            found = self.look(ranks)
        return found

    def _life(self, beat: Beat) -> Life:
        now = self._monotonic()
        before = self._seen.get(beat.rank)
        if before is None:
            # By a clock that is ahead of ours as well: its beat is in doubt, however old it is.
            self._seen[beat.rank] = beat, now - abs(self._now() - beat.written)
        elif before[0] != beat:
            self._seen[beat.rank] = beat, now
        age_s = now - self._seen[beat.rank][1]
        return Life(beat, age_s, age_s > SILENT_S)
