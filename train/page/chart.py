"""Line charts as SVG. Colours are classes of the page's style: light or dark is decided where it is read."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 640, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 12, 16, 40
_POINTS = 600
_TICKS = 5
_WORTH_LOGARITHMIC = 30  # highest over lowest
COLOURS = 8
"""Classes `s0` to `s7`; more lines begin anew, dashed."""


@dataclass(frozen=True)
class Line:
    """Points of a chart, by ascending x; those that are not finite are left out.

    Attributes:
        name: in the legend.
        points: x and y.
        colour: number of its class.
        faint: drawn thin, behind others of the same colour.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    faint: bool = False


@dataclass(frozen=True)
class Chart:
    """What a line chart shows, however it is drawn.

    Attributes:
        title: above it.
        lines: at least one.
        unit: of y, beside the title.
        logarithmic: of y, if all of it is positive and spans more than a decade.
        from_zero: whether y begins at 0.
        marks: places on x with what happened there.
        x_name: below the axis.
    """

    title: str
    lines: Sequence[Line]
    unit: str = ""
    logarithmic: bool = False
    from_zero: bool = False
    marks: Sequence[tuple[float, str]] = ()
    x_name: str = "step"

    @property
    def empty(self) -> bool:
        """Whether no line has a point."""
        return not any(_finite(line.points) for line in self.lines)

    @property
    def spans_decades(self) -> bool:
        """Whether y is to be logarithmic."""
        ys = [y for line in self.lines for _, y in _finite(line.points)]
        return self.logarithmic and 0 < min(ys) < max(ys) / _WORTH_LOGARITHMIC


def line_chart(chart: Chart) -> str:
    """A figure with its title and legend; empty if no line has a point."""
    if chart.empty:
        return ""
    title, lines, from_zero, marks, x_name = chart.title, chart.lines, chart.from_zero, chart.marks, chart.x_name
    drawn = [Line(line.name, _thinned(_finite(line.points)), line.colour, line.faint) for line in lines]
    drawn = [line for line in drawn if line.points]
    xs, ys = ([point[axis] for line in drawn for point in line.points] for axis in (0, 1))
    across = _Axis.of(min(xs), max(xs), _LEFT, _WIDTH - _RIGHT)
    up = _Axis.of(0.0 if from_zero else min(ys), max(ys), _HEIGHT - _BOTTOM, _TOP, logarithmic=chart.spans_decades)
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">']
    for value in up.ticks():
        y = up.place(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" text-anchor="end" x="{_LEFT - 6}" y="{y + 4:.1f}">{short(value)}</text>')
    for value in across.ticks():
        x = across.place(value)
        parts.append(f'<text class="tick" text-anchor="middle" x="{x:.1f}" y="{_HEIGHT - 22}">{short(value)}</text>')
    parts.append(
        f'<text class="tick" text-anchor="end" x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 3}">{escape(x_name)}</text>'
    )
    for x_value, told in marks:
        x = across.place(x_value)
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}">')
        parts.append(f"<title>{escape(told)}</title></line>")
    parts += [_path(line, across.place, up.place) for line in sorted(drawn, key=lambda line: not line.faint)]
    parts.append("</svg>")
    return figure(title, "".join(parts), [(line.name, style(line)) for line in drawn], unit=chart.unit)


def figure(title: str, svg: str, legend: Sequence[tuple[str, str]], *, unit: str = "") -> str:
    """A figure of the page; the legend has names and classes, and is left out where it would tell nothing."""
    keys = "".join(f'<span><i class="key {kind}"></i>{escape(name)}</span>' for name, kind in legend)
    told = f" <small>{escape(unit)}</small>" if unit else ""
    below = f'<div class="legend">{keys}</div>' if len(legend) > 1 else ""
    return f"<figure><figcaption>{escape(title)}{told}</figcaption>{svg}{below}</figure>"


def style(line: Line) -> str:
    """The classes of a line."""
    dashed = " dashed" if line.colour >= COLOURS else ""
    return f"s{line.colour % COLOURS}{dashed}{' faint' if line.faint else ''}"


def short(value: float) -> str:
    """A number of an axis in a few characters: `0.02`, `1.5k`, `3e-05`."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    @classmethod
    def of(cls, low: float, high: float, start: float, end: float, *, logarithmic: bool = False) -> "_Axis":
        if logarithmic:
            low, high = math.log10(low), math.log10(high)
        if high - low < 1e-9 * max(1.0, abs(high)):
            low, high = low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)
        return cls(low, high, start, end, logarithmic)

    def place(self, value: float) -> float:
        value = math.log10(value) if self.logarithmic else value
        return self.start + (self.end - self.start) * (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        step = 10 ** math.floor(math.log10((self.high - self.low) / _TICKS))
        step *= next(times for times in (1, 2, 5, 10) if (self.high - self.low) / (step * times) <= _TICKS + 1)
        first = math.ceil(self.low / step - 1e-9)
        values = [number * step for number in range(first, math.floor(self.high / step + 1e-9) + 1)]
        return [10**value for value in values] if self.logarithmic else values


def _finite(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of many points the lowest and highest of each stretch: no spike is lost."""
    size = 2 * math.ceil(len(points) / _POINTS)
    if size <= 2:
        return points
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        kept += sorted({min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])})
    return kept


def _path(line: Line, across: Callable[[float], float], up: Callable[[float], float]) -> str:
    places = [f"{across(x):.1f},{up(y):.1f}" for x, y in line.points]
    last = f"{line.name}: {line.points[-1][1]:.6g}"
    shape = f'<polyline class="line {style(line)}" points="{" ".join(places)}"><title>{escape(last)}</title></polyline>'
    if len(places) > 30:
        return shape
    dots = zip(line.points, places, strict=True)
    return shape + "".join(
        f'<circle class="dot {style(line)}" cx="{place.split(",")[0]}" cy="{place.split(",")[1]}" r="2.5">'
        f"<title>{escape(f'{line.name}, {x:g}: {y:.6g}')}</title></circle>"
        for (x, y), place in dots
    )
