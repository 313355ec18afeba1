"""`engram plan --simulate`: what grows with the ranks, and what must not."""

import json
from pathlib import Path

import pytest
from click.testing import Result

from tests.command_line import assert_refused, invoke

TINY = str(Path(__file__).parents[3] / "configs" / "tiny.yaml")
SMALL = (TINY, "--simulate", "data.sequence_length=32", "train.global_batch_size=64", "--sequences-per-rank", "2")


def run(*arguments: str) -> Result:
    return invoke("plan", *SMALL, *arguments)


def test_worlds_share_the_same_rows_and_a_growing_batch_uses_more() -> None:
    result = run("--worlds", "1,4,16", "--json")
    assert result.exit_code == 0, result.stderr
    points = json.loads(result.stdout)
    assert [(point["batch"], point["ranks"]) for point in points] == [
        (batch, ranks) for batch in ("fixed", "growing") for ranks in (1, 4, 16)
    ]
    fixed, growing = points[:3], points[3:]
    # With all owners looked at, their rows are the step's, whatever the world.
    assert fixed[0]["owned_mean"] == 4 * fixed[1]["owned_mean"] == 16 * fixed[2]["owned_mean"]
    assert [point["tokens"] for point in growing] == [64, 256, 1024]
    assert [point["sequences"] for point in fixed] == [64] * 3
    assert 4 * growing[0]["owned_mean"] < fixed[0]["owned_mean"]  # 2 sequences of 64
    assert growing[0]["used"] < growing[1]["used"] < growing[2]["used"] < 1
    assert fixed[0]["exchange_bytes"] > fixed[1]["exchange_bytes"] > fixed[2]["exchange_bytes"]
    assert [point["node_bytes"] > 0 for point in fixed] == [False, False, True]
    assert fixed[2]["imbalance"] > 1
    assert all(0 <= point["hit_rate"] <= 1 for point in points)


def test_the_table_fits_80_columns_and_plots_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = run("--worlds", "2,8", "--plot", str(tmp_path / "scale.png"))
    assert result.exit_code == 0, result.stderr
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "With a growing batch" in result.stdout
    assert (tmp_path / "scale.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--worlds", "5000"), "5000 is not in the range 1<=x<=4096"),
        (("model.engram=null",), "tiny has no Engram tables (model.engram): there is nothing to simulate"),
        (("data.sequence_length=10000000",), "--sequences-per-rank times the largest of --worlds"),
        (("--plot", "no/where/a.png"), "--plot no/where/a.png: there is no folder no/where"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments: tuple[str, ...], message: str) -> None:
    assert_refused(run(*arguments), message)
