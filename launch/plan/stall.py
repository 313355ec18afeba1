"""How long the loop waits for rows, by look-ahead.

With c the step without waiting, p to plan, q to decide on slots, f to fetch and w to write back (seconds per step; f
and w share the bus, and are as slow as that makes them), the time from step to step is the largest of

    depth 0    c + q + f          and w, p: no part of the fetch is hidden by a step
    depth d    c, p, q, f, w      each is done once a step by somebody who does one thing at a time
               (q + w + f) / d    a step's rows come when others have left, within the d steps that they are ahead

and the stall is its excess over c. On two CPU cores with an emulated link of f = w = 0.69 c this says 41, 28, 0 and 0 %
of the step at depths 0, 1, 2 and 4; measured were 41.0, 25.1, 0.0 and 0.0 (docs/performance.md, "Stall by look-ahead").
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stages:
    """Seconds of a step's stages beside the loop, and `step` of the loop itself."""

    step: float
    plan: float
    decide: float
    fetch: float
    write_back: float

    def period(self, depth: int) -> float:
        """Seconds from one step to the next at a look-ahead."""
        move = self.decide + self.write_back + self.fetch
        if depth == 0:
            return max(self.step + self.decide + self.fetch, self.plan, self.write_back)
        return max(self.step, self.plan, self.decide, self.fetch, self.write_back, move / depth)

    def stall(self, depth: int) -> float:
        """Seconds that the loop waits in each step."""
        return self.period(depth) - self.step


def least_depth(stages: Stages, depths: tuple[int, ...] = (0, 1, 2, 4), share: float = 0.005) -> int:
    """The smallest look-ahead whose stall is within `share` of the step of that which waits least."""
    least = min(map(stages.period, depths))
    return next(depth for depth in depths if stages.period(depth) <= least + share * stages.step)
