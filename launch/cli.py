"""The commands of `engram`, and how a user's mistake is reported."""

import difflib
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
from click.exceptions import NoArgsIsHelpError

from launch.local.failures import USER_ERROR_EXIT, RankFailed, user_message

COMMANDS = (
    "bench",
    "checkpoint",
    "compare",
    "data",
    "doctor",
    "eval",
    "export",
    "generate",
    "inspect",
    "launch",
    "plan",
    "report",
    "status",
    "train",
    "tune",
)
"""The commands: modules of `launch.commands` with a click command named `command`."""


class EngramGroup(click.Group):
    """Imports a command when it is asked for, and reports a user's mistake in one line with exit code 2."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all commands."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name."""
        if cmd_name not in COMMANDS:
            near = difflib.get_close_matches(cmd_name, COMMANDS, n=1)
            hint = f"did you mean `engram {near[0]}`?" if near else f"there are: {', '.join(COMMANDS)}."
            ctx.fail(f"No such command '{cmd_name}'; {hint}")
        command: click.Command = importlib.import_module(f"launch.commands.{cmd_name}").command
        command.name = cmd_name
        return command

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Reads the options before the command."""
        with _told_in_one_line():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command."""
        with _told_in_one_line():
            return super().invoke(ctx)


class _Mistake(click.ClickException):
    exit_code = USER_ERROR_EXIT


@contextmanager
def _told_in_one_line() -> Iterator[None]:
    try:
        yield
    except NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        place = f" (see `{error.ctx.command_path} --help`)" if error.ctx else ""
        raise _Mistake(error.format_message() + place) from None
    except RankFailed as error:
        raise click.ClickException(str(error)) from None
    except (ValueError, OSError) as error:
        message = user_message(error)
        if message is None:
            raise
        raise _Mistake(message) from None


@click.group(
    cls=EngramGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    epilog="""\b
Example:
  engram train configs/tiny.yaml train.steps=100
""",
)
# DeepSpeed's launcher passes it to each process, which reads LOCAL_RANK instead.
@click.option("--local_rank", type=int, hidden=True, expose_value=False)
@click.version_option(package_name="engram-pretrain", prog_name="engram")
def main() -> None:
    """Pretrain language models whose memory is larger than the GPUs' memory."""
