"""The command line of the emulation."""

import pytest
from click.testing import CliRunner, Result

from tests.emulation.__main__ import main
from tests.emulation.test_run import TINY

SMALL = (
    "data.path=no/such/folder",
    "model.engram.rows_per_head=400",
    "offload.window_rows=3300",
    "train.global_batch_size=4",
    "train.micro_batch_size=4",
    "data.sequence_length=32",
)


def invoked(*arguments: str) -> Result:
    return CliRunner().invoke(main, [str(TINY), *SMALL, "--warmup", "2", "--steps", "1", *arguments])


def test_the_command_prints_a_table_and_calls_it_emulated() -> None:
    result = invoked("--depths", "1")
    assert result.exit_code == 0, result.output
    assert result.output.startswith("EMULATED: ")
    assert "gradient norms of other bits than resident: none" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--machine", "h300"), "no numbers of 'h300'"),
        (("--scale", "3"), "train.global_batch_size: 4 sequences do not divide into 3 parts"),
        (("model.engram=null",), "has no Engram tables"),
        (("model.hiden_size=3",), "hiden_size"),
    ],
)
def test_a_mistake_is_told_in_one_line(arguments: tuple[str, ...], message: str) -> None:
    result = invoked(*arguments)
    assert result.exit_code == 1
    assert message in result.output
    assert len(result.output.splitlines()) == 1


def test_a_window_too_small_for_a_step_is_told_and_no_crash() -> None:
    result = invoked("offload.window_rows=10", "--depths", "1")
    assert result.exit_code == 1
    assert "offload.window_rows: step 1 alone needs" in result.output.splitlines()[-1]
