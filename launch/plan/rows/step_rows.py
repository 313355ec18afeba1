"""The sizes of a step's rows, of replayed steps and of plans that were made."""

from dataclasses import dataclass

from launch.plan.rows.planning import Planned
from launch.plan.rows.traffic import Replayed


@dataclass(frozen=True)
class StepRows:
    """The sizes of a step's rows; of all modules, the busiest rank's.

    Attributes:
        lookups: of one rank.
        unique: rows that it requests.
        asked: rows that ranks request from it.
        owned: rows of its shard that the step uses.
        index_bytes: of a plan, per lookup.
    """

    lookups: float
    unique: float
    asked: float
    owned: float
    index_bytes: float = 16.0


def step_rows(replayed: Replayed, planned: Planned) -> StepRows:
    """The busiest sampled owner's. A rank requests as many rows as are requested from an owner on average."""
    return StepRows(
        replayed.lookups / replayed.ranks,
        replayed.mean(lambda owner: owner.asked),
        replayed.most(lambda owner: owner.asked),
        replayed.most(lambda owner: owner.most),
        planned.index_bytes,
    )
