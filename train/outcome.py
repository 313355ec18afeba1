"""What has come of a run: continued prompts, and the figures of its summary."""

import statistics

import torch

from model.config import ModelConfig
from offload.tables import EngramTables
from train.data.batches.packing import IGNORED
from train.evaluation import Evaluation, batches
from train.loaders import build_held_out
from train.parts import Parts
from train.report.metrics import METRICS_FILE, read_metrics
from train.report.summary import SourceSummary, Summary
from train.use.sampling import continue_texts


def continued_prompts(parts: Parts) -> list[str]:
    """Continues the config's prompts. Collective."""
    job = parts.job
    return continue_texts(
        parts.engine,
        parts.tables,
        parts.store.tokenizer(),
        job.eval.prompts if job.eval.sample_tokens else [],
        num_tokens=job.eval.sample_tokens,
        temperature=job.eval.temperature,
        max_length=job.data.longest,
        seed=job.train.seed,
    )


def summarise(
    parts: Parts,
    found: Evaluation | None,
    samples: list[str],
    rows_moved: int,
    *,
    tokens: int,
    start: int,
    look_ahead: int | None,
) -> Summary:
    """The summary of a run.

    Args:
        parts: of the job.
        found: by the last evaluation; None if nothing is held out to predict.
        samples: continued prompts.
        rows_moved: between host memory and the windows.
        tokens: that it was trained on, from its very start.
        start: the step at which it resumed.
        look_ahead: that it chose itself; None for none.
    """
    job, tables = parts.job, parts.tables
    windowed = tables is not None and job.offload.mode == "window"
    speeds = [r["tokens_per_s"] for r in read_metrics(parts.folder / METRICS_FILE) if r["step"] > start]
    summary = Summary(
        run=str(parts.folder),
        steps=job.train.steps,
        tokens=tokens,
        val_loss=found.loss if found else None,
        val_bits_per_byte=found.bits_per_byte if found else None,
        unigram_entropy=_unigram_entropy(parts),
        parameters=parts.counts.total + _table_parameters(tables),
        active_parameters=parts.counts.active + _active_table_parameters(job.model),
        table_parameters=_table_parameters(tables),
        table_bytes=parts.table_bytes,
        window_bytes=tables.window_bytes * parts.world_size if tables and windowed else None,
        rows_moved=rows_moved,
        tokens_per_s=statistics.median(speeds) if speeds else None,
        samples=samples,
        init_from=job.checkpoint.init_from,
        look_ahead=look_ahead,
        vocab_size=job.model.vocab_size,
        sources=_sources(parts, found),
    )
    return summary if start < job.train.steps else summary.kept(parts.folder)


def _unigram_entropy(parts: Parts) -> float | None:
    # Of the very tokens that were evaluated, by all ranks.
    found = []
    for source, (_, share, loader) in enumerate(build_held_out(parts.job, parts.blend, rank=0, world_size=1)):
        labels = [batch.labels_BT.flatten() for batch in batches(loader, parts.job.eval.sequences)]
        if share and any(bool((part != IGNORED).any()) for part in labels):
            found.append((share, parts.train_loader.unigram_entropy(torch.cat(labels), source=source)))
    if len(found) < 2:
        return found[0][1] if found else None
    return sum(share * entropy for share, entropy in found) / sum(share for share, _ in found)


def _sources(parts: Parts, found: Evaluation | None) -> dict[str, SourceSummary]:
    """What the run has of each source of a mixture; empty without one."""
    if len(parts.blend.sources) == 1:
        return {}
    validated = found.by_source if found else {}
    return {
        name: SourceSummary(
            seen.tokens,
            seen.epochs,
            validated[name].loss if name in validated else None,
            validated[name].bits_per_byte if name in validated else None,
        )
        for name, seen in parts.train_loader.seen(parts.job.train.steps).items()
    }


def _table_parameters(tables: EngramTables | None) -> int:
    return tables.num_parameters if tables else 0


def _active_table_parameters(model: ModelConfig) -> int:
    return len(model.engram.layers) * model.engram.memory_width if model.engram else 0
