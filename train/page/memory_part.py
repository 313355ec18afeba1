"""What the page tells of a run's memory: gates over a sample of text, rows that were touched, and collisions."""

from collections import defaultdict
from collections.abc import Sequence
from html import escape

from train.errors import UserError
from train.page.chart import figure
from train.page.told_run import ToldRun
from train.use.inspection import Inspector, TokenView
from train.use.saved_run import SavedRun

SAMPLE_TOKENS = 192
_BINS = 20
_WIDTH, _HEIGHT = 320, 110


def memory_part(run: ToldRun, text: str | None) -> str:
    """Figures of the newest checkpoint; a line that says why there are none.

    Args:
        run: whose memory.
        text: to be read; None for the config's prompts.
    """
    try:
        saved = SavedRun.open(run.folder)
        inspector = Inspector(saved)
        ids = next(inspector.pieces(text or "\n".join(run.job.eval.prompts) or "def main():"))[:SAMPLE_TOKENS]
        views = inspector.look(ids, likeliest=1)
    except UserError as error:
        return f"<p>{escape(run.name)}: {escape(str(error))}</p>"
    parts = [f"<h3>{escape(run.name)}, step {saved.step}</h3>", _touched(inspector, saved, ids)]
    for module, layer in enumerate(inspector.layers):
        openings = [view.layers[module].opening for view in views]
        parts.append(f'<div class="gates">{_histogram(layer, openings)}{_coloured(views, module, layer)}</div>')
    return "".join(parts)


def _coloured(views: Sequence[TokenView], module: int, layer: int) -> str:
    spans = []
    for view in views:
        read = view.layers[module]
        told = f"gate {read.opening:.2f}; {'; '.join(f'{n.text!r} {n.counts}' for n in read.ngrams)}"
        shown = escape(view.text).replace("\n", "\u23ce\n")
        spans.append(f'<span style="--gate:{100 * read.opening:.0f}%" title="{escape(told)}">{shown}</span>')
    heading = f"<h4>Layer {layer}: the darker, the further the gate opens</h4>"
    return f'<div>{heading}<pre class="text">{"".join(spans)}</pre></div>'


def _histogram(layer: int, openings: Sequence[float]) -> str:
    counts = [0] * _BINS
    for value in openings:
        counts[min(_BINS - 1, int(value * _BINS))] += 1
    top, width = max(counts) or 1, _WIDTH / _BINS
    bars = "".join(
        f'<rect class="bar s0" x="{at * width:.1f}" y="{_HEIGHT - 18 - 80 * count / top:.1f}" width="{width - 1:.1f}" '
        f'height="{80 * count / top:.1f}"><title>{at / _BINS:.2f} to {(at + 1) / _BINS:.2f}: {count}</title></rect>'
        for at, count in enumerate(counts)
    )
    mean = sum(openings) / len(openings)
    svg = (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="gate openings of layer {layer}">{bars}'
        f'<text class="tick" x="0" y="{_HEIGHT - 4}">0</text>'
        f'<text class="tick" text-anchor="end" x="{_WIDTH}" y="{_HEIGHT - 4}">1</text></svg>'
    )
    return figure(f"Gate of layer {layer}", svg, [], unit=f"mean {mean:.2f} over {len(openings)} tokens")


def _touched(inspector: Inspector, saved: SavedRun, ids: Sequence[int]) -> str:
    """Rows that were ever updated, and n-grams of the sample that share a row."""
    touched, total = sum(span.count for span in saved.image.spans), sum(inspector.table_rows)
    ngrams: dict[tuple[int, int, int], set[str]] = defaultdict(set)
    heads = 0
    for module, rows_TS in enumerate(inspector.rows_of(ids)):
        heads = rows_TS.shape[1] // len(inspector.orders)
        for at, rows in enumerate(rows_TS.tolist()):
            for place, row in enumerate(rows):
                ngrams[module, place, row].add(inspector.ngram(ids, at, inspector.orders[place // heads]))
    shared = sum(len(texts) > 1 for texts in ngrams.values())
    return (
        f"<p>{touched:,} of {total:,} rows were ever updated ({100 * touched / total:.1f} %). Of {len(ngrams):,} rows "
        f"that the sample reads, {shared:,} are read for n-grams of different text (collisions, and tokens that "
        "compression takes for one).</p>"
    )
