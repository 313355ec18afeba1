"""What a step's time goes to, over the run: stages on top of each other."""

from collections.abc import Sequence
from html import escape

from train.page.chart import Line, figure, short, style

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 640, 220, 76, 24
_BARS = 80


def stacked_bars(title: str, names: Sequence[str], rows: Sequence[tuple[float, Sequence[float]]], *, unit: str) -> str:
    """A figure with a bar for each stretch of rows: x, and a value for each name. Empty without rows."""
    if not rows:
        return ""
    size = -(-len(rows) // _BARS)
    bars = [_mean(rows[start : start + size]) for start in range(0, len(rows), size)]
    top = max(sum(values) for _, values in bars) or 1.0
    width = (_WIDTH - _LEFT - 8) / len(bars)
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">']
    for share in (0.0, 0.5, 1.0):
        y = _HEIGHT - _BOTTOM - share * (_HEIGHT - _BOTTOM - 16)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - 8}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="tick" text-anchor="end" x="{_LEFT - 6}" y="{y + 4:.1f}">{short(share * top)}</text>'
        )
    for number, (x_value, values) in enumerate(bars):
        y = float(_HEIGHT - _BOTTOM)
        for colour, value in enumerate(values):
            height = value / top * (_HEIGHT - _BOTTOM - 16)
            y -= height
            told = escape(f"step {x_value:g}: {names[colour]} {value:.4g} {unit}")
            parts.append(
                f'<rect class="bar s{colour}" x="{_LEFT + number * width:.1f}" y="{y:.2f}" '
                f'width="{max(width - 1, 1):.2f}" height="{height:.2f}"><title>{told}</title></rect>'
            )
    parts.append(f'<text class="tick" x="{_LEFT}" y="{_HEIGHT - 4}">step {short(bars[0][0])}</text>')
    parts.append(
        f'<text class="tick" text-anchor="end" x="{_WIDTH - 8}" y="{_HEIGHT - 4}">{short(bars[-1][0])}</text></svg>'
    )
    return figure(
        title, "".join(parts), [(name, style(Line(name, (), at))) for at, name in enumerate(names)], unit=unit
    )


def _mean(rows: Sequence[tuple[float, Sequence[float]]]) -> tuple[float, list[float]]:
    columns = zip(*(values for _, values in rows), strict=True)
    return rows[-1][0], [sum(column) / len(rows) for column in columns]
