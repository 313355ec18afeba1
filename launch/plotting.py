"""Plots as files, by matplotlib where it is installed."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from train.errors import UserError


@contextmanager
def plots(file: Path, title: str, rows: int, columns: int, size: tuple[float, float]) -> Iterator[Any]:
    """Hands out the axes of a figure of `size` inches, which is written when they are filled: PNG or SVG by the name.

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise UserError(f"{file}: plots need matplotlib; run: pip install 'engram-pretrain[plots]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, figsize=size, layout="constrained")
    yield axes
    figure.suptitle(title)
    try:
        figure.savefig(file, dpi=110)
    except (OSError, ValueError) as error:  # a name whose ending it does not know
        raise UserError(f"{file}: {error}") from None
    finally:
        pyplot.close(figure)
