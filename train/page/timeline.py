"""The steps that `train.profile` recorded, as lanes: plans, fetches, exchanges, computation, write-backs."""

import gzip
import json
import zlib
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from train.page.chart import figure
from train.report.trace import LANE, LANES, TRACE_FILE

_WIDTH, _LEFT, _LANE, _GAP = 960, 92, 18, 6
_MOST_RANKS = 2
_NARROW = 0.3  # of a unit: what is thinner is not seen, and there may be thousands


def timeline(folder: Path) -> str:
    """A figure of the first ranks' lanes; empty if the run has no trace with lanes."""
    events = _events(folder / TRACE_FILE)
    if not events:
        return ""
    ranks = sorted({event["pid"] for event in events})[:_MOST_RANKS]
    shown = [event for event in events if event["pid"] in ranks]
    start, end = min(event["ts"] for event in shown), max(event["ts"] + event["dur"] for event in shown)
    scale = (_WIDTH - _LEFT - 8) / max(end - start, 1e-9)
    rows = [(rank, tid) for rank in ranks for tid in range(len(LANES))]
    height = len(rows) * (_LANE + _GAP) + 30
    parts = [f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="timeline of recorded steps">']
    for number, (rank, tid) in enumerate(rows):
        y = number * (_LANE + _GAP) + 4
        parts.append(f'<text class="tick" text-anchor="end" x="{_LEFT - 6}" y="{y + 13}">{rank} {LANES[tid]}</text>')
        parts += _blocks([e for e in shown if (e["pid"], e["tid"]) == (rank, tid)], start, scale, y)
    told = f"{(end - start) / 1000:.1f} ms, {len({event['pid'] for event in events})} ranks recorded"
    parts.append(f'<text class="tick" text-anchor="end" x="{_WIDTH - 8}" y="{height - 6}">{told}</text></svg>')
    return figure("Recorded steps", "".join(parts), [], unit="a lane a row, by rank")


def _blocks(events: Sequence[dict[str, Any]], start: float, scale: float, y: int) -> list[str]:
    blocks = []
    for event in sorted(events, key=lambda event: event["ts"]):
        width = event["dur"] * scale
        if width < _NARROW:
            continue
        name = str(event["name"])
        colour = _COLOURS.get(name) or _COLOURS.get(LANES[event["tid"]], 0)
        told = escape(f"{name}: {event['dur'] / 1000:.3f} ms")
        x = _LEFT + (event["ts"] - start) * scale
        blocks.append(
            f'<rect class="bar s{colour}" x="{x:.2f}" y="{y}" width="{width:.2f}" height="{_LANE}">'
            f"<title>{told}</title></rect>"
        )
    return blocks


_STAGES = ("plan", "fetch", "exchange", "forward", "backward", "reduce", "update", "write back")
_COLOURS = {name: number for number, name in enumerate(_STAGES)}
_COLOURS["compute"] = _COLOURS["forward"]  # a GPU's kernels are of no stage


def _events(path: Path) -> list[dict[str, Any]]:
    try:
        trace = json.loads(gzip.decompress(path.read_bytes()))
        return [event for event in trace["traceEvents"] if event.get("cat") == LANE]
    except (OSError, ValueError, EOFError, zlib.error, KeyError, TypeError):
        return []
