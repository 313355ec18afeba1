"""Where each node keeps its own files, metrics and log go with rank 0."""

import os
import platform
from pathlib import Path

import torch.distributed as dist

from tests.distributed import run_ranks
from train.checkpoint.nodes import Nodes
from train.history import FILES, bring_history


def history(folder: Path) -> dict[str, str]:
    return {name: (folder / name).read_text() for name in FILES if (folder / name).exists()}


def move_around(folder: Path) -> list[tuple[list[str], dict[str, str]]]:
    """Rank 0 goes from node a to b and back, telling a little everywhere; what each start told, and had before it."""
    rank, found = dist.get_rank(), []
    group = dist.new_group(backend="gloo")
    for step, nodes in enumerate(("ab", "ba", "ab", "ab", "aa")):
        mine = folder / nodes[rank]
        platform.node = lambda node=nodes[rank]: f"node-{node}"  # type: ignore[misc]
        here = Nodes.found(mine, group)
        notes = bring_history(mine, here, step)
        found.append((notes, history(mine)))
        if rank == 0:
            for name in FILES:
                # On b nothing was skipped: what a has of it is to go.
                if (name, nodes[0]) != ("skipped.jsonl", "a") or step == 0:
                    with (mine / name).open("a") as file:
                        file.write(f"{step}{nodes[0]}")
            os.utime(mine / FILES[0], ns=(step + 1, step + 1))
            if step == 1:
                (mine / "skipped.jsonl").unlink()
        dist.barrier()
    for name in FILES:
        for node in "ab":
            (folder / node / name).unlink(missing_ok=True) if rank == 0 else None
    dist.barrier()
    return [*found, (bring_history(folder / "ab"[rank], Nodes.found(folder / "ab"[rank], group), 7), {})]


def test_metrics_and_log_go_with_rank_0_from_the_node_that_wrote_last(tmp_path: Path) -> None:
    told, had = zip(*run_ranks(move_around, 2, tmp_path)[0], strict=True)
    assert had[0] == {}
    assert had[1] == dict.fromkeys(FILES, "0a")
    assert had[2] == {name: "0a1b" for name in FILES if name != "skipped.jsonl"}
    assert had[3]["metrics.jsonl"] == "0a1b2a"
    assert told[0] == told[3] == told[4] == []
    assert told[1] == ["metrics and log up to step 1 are from node node-a, where rank 0 was before"]
    assert told[2] == ["metrics and log up to step 2 are from node node-b, where rank 0 was before"]
    assert told[5] == [f"{tmp_path}/a/metrics.jsonl begins after step 7: no node of this job has the earlier records"]
