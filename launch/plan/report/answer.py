"""An assessment as a JSON object. Seconds, bytes, rows; of a rank unless a key says otherwise."""

from dataclasses import asdict
from typing import Any

from launch.plan.assessment import Assessment, bytes_a_step
from launch.plan.memory.budgets import Budget, device_budget, host_budget
from launch.plan.rows.traffic import DEPTHS


def to_json(found: Assessment) -> dict[str, Any]:
    """All of it."""
    cluster, stages = found.cluster, found.time.stages
    return found.figures.to_json() | {
        "cluster": {
            "nodes": cluster.nodes,
            "gpus_per_node": cluster.gpus_per_node,
            "gpu": cluster.gpu,
            "hardware": cluster.hardware.model_dump(),
            "network": cluster.network.model_dump() if cluster.network else None,
        },
        "device_bytes": _budget(found, found.device, device_budget),
        "host_bytes_a_node": _budget(found, found.host, host_budget),
        "rows": _rows(found),
        "step": {
            "seconds": found.seconds,
            "without_stall": found.time.seconds,
            "parts": found.time.parts,
            "compute": found.time.compute,
            "launches": found.time.launches,
            "beside": {name: value for name, value in vars(stages).items() if name != "step"},
            "stall": {str(depth): stages.stall(depth) for depth in DEPTHS},
        },
        "advice": asdict(found.advice) if found.advice else None,
        "tokens_per_s": found.tokens_per_second,
        "budget": {"tokens": found.tokens, "days": found.days, "cost": found.cost},
    }


def _budget(found: Assessment, budget: Budget, of: Any) -> dict[str, Any]:
    change = found.change(of, budget)
    return {
        "parts": budget.parts,
        "total": budget.total,
        "usable": budget.capacity,
        "free": budget.free,
        "smallest_change": asdict(change) if change else None,
    }


def _rows(found: Assessment) -> dict[str, Any] | None:
    replayed, rows = found.replayed, found.rows
    if replayed is None or rows is None or found.planned is None:
        return None
    return {
        "stream": replayed.stream,
        "steps_replayed": replayed.steps + replayed.warmup,
        "steps_counted": replayed.steps,
        "one_row_of": replayed.thinned,
        "owners": [asdict(owner) | {"hit_rate": owner.hit_rate} for owner in replayed.owners],
        "imbalance": replayed.imbalance,
        "busiest_rank": asdict(rows),
        "bytes_a_step": bytes_a_step(found),
        "plan_seconds_a_lookup": found.planned.seconds,
    }
