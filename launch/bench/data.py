"""Part `data`: preparing text beside Hugging Face's tokenizers alone, its memory, and the loader beside steps."""

import itertools
import json
import os
import shutil
import statistics
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from launch.bench.measure import Spread, in_turns, timed
from launch.bench.options import BenchOptions
from launch.bench.peak_memory import PeakMemory
from launch.bench.report import Cell, Measure, Section
from train.config.file import load
from train.config.job import JobConfig
from train.data.blend import Blend
from train.data.interruptible import interruptible
from train.data.preparation.corpus import PythonCorpus
from train.data.preparation.encode import batches_of, texts_of
from train.data.preparation.prepare import prepare
from train.data.preparation.sources import Report
from train.data.stores.manifest import Manifest
from train.data.tokenization.tokenizer import Tokenizer
from train.errors import UserError
from train.loaders import build_loader
from train.progress import Progress
from train.report.metrics import METRICS_FILE, read_metrics
from train.run_folder import CONFIG_FILE, find_run

_OF_TOKENIZERS, _OF_STEP, _GROWTH = 1.3, 0.01, 1.5
_BPE = 4096
_TIMES = 4  # a large file or document, and one so many times as large
_BATCHES = 200


def measure_data(options: BenchOptions, progress: Progress) -> Section:
    """Everything on one core: tokenizers' own threads are off, and no process is started.

    Raises:
        UserError: the run is none, or its data are gone.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    texts = list(_texts(options.text_mb * 1_000_000))
    progress.expect(options.rounds + 5)
    tokenizer = Tokenizer.train_bpe(itertools.islice(texts, 500), _BPE)
    folder = Path(options.folder)
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    progress.advance()
    seconds = _raced(tokenizer, texts, folder / "text.jsonl", options.rounds, progress)
    made = _prepare(folder / "text.jsonl", tokenizer)
    ratio = Spread.of([ours / theirs for ours, theirs in zip(seconds["prepare"], seconds["tokenizers"], strict=True)])
    rows = [
        _row("tokenizers", "text alone, in memory", seconds["tokenizers"], made),
        _row("prepare", ".jsonl to a store", seconds["prepare"], made, ratio=ratio),
    ]
    measures = [Measure("prepare takes of tokenizers' time", ratio.median, _OF_TOKENIZERS)]
    for what in ("file", "document"):
        peaks = {}
        for times in (1, _TIMES):
            path = _large(what, texts, folder, times)
            peaks[times] = _peak_mib(path, tokenizer)
            size = f"{path.stat().st_size / 1e6:,.0f} MB"
            rows.append(_row(f"prepare, one {what}", size, [], made, peak=peaks[times]))
            progress.advance()
        measures.append(Measure(f"memory with a {what} {_TIMES} times as large", peaks[_TIMES] / peaks[1], _GROWTH))
    if options.run is not None:
        row, share = _loading(options.run)
        rows.append(row)
        measures.append(Measure("the loader takes of a step of the run", share, _OF_STEP))
    return Section(
        f"Data, {options.text_mb} MB of Python's standard library on one core",
        rows,
        measures,
        [
            f"{options.rounds} rounds in turns; median (10th to 90th percentile); ratios compare round by round",
            f"a byte-level BPE of {_BPE} entries; tokenizers gets the same batches, on a thread as well",
            "peak: memory of a process of its own beyond what it held before, page cache left out",
        ],
    )


def _texts(size: int) -> Iterator[str]:
    """Documents of the standard library, again and again, up to about `size` characters."""
    for text in itertools.chain.from_iterable(PythonCorpus().documents(Report()) for _ in itertools.count()):
        if size <= 0:
            return
        size -= len(text)
        yield text


def _raced(
    tokenizer: Tokenizer, texts: list[str], file: Path, rounds: int, progress: Progress
) -> dict[str, list[float]]:
    """Seconds that tokenizing the texts and preparing the file with them take, in each round."""
    seconds: dict[str, list[float]] = defaultdict(list)
    acts = {"tokenizers": lambda: _tokenize(tokenizer, texts), "prepare": lambda: _prepare(file, tokenizer)}
    for number in range(rounds):
        for name, act in in_turns(acts, number):
            seconds[name].append(timed(act))
        progress.advance()
    return seconds


def _tokenize(tokenizer: Tokenizer, texts: list[str]) -> None:
    for batch in map(texts_of, batches_of(texts, tokenizer)):
        # On a thread of its own, as a preparation does: that takes less time than on the main one.
        interruptible(lambda batch=batch: tokenizer.backend.encode_batch_fast(batch, add_special_tokens=False))  # type: ignore[misc]


def _prepare(path: Path, tokenizer: Tokenizer) -> Manifest:
    out = path.with_name("store")
    shutil.rmtree(out, ignore_errors=True)
    return prepare([path], out, tokenizer=tokenizer, workers=1, progress=False)


def _peak_mib(path: Path, tokenizer: Tokenizer) -> float:
    """The memory that a preparation takes in a process of its own: this one has kept what others have freed."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_prepare_watched, path, tokenizer.json, tokenizer.specials["eos_token"]).result()


def _prepare_watched(path: Path, source: str, eos: str) -> float:
    with PeakMemory() as peak:
        _prepare(path, Tokenizer(source, name="bench", eos=eos))
    return peak.bytes / 2**20


def _large(what: str, texts: list[str], folder: Path, times: int) -> Path:
    """One file of all texts, as many times; or a quarter of them as one document, which is read and tokenized whole."""
    path = folder / f"{what}.{'jsonl' if what == 'document' else 'txt'}"
    with path.open("w", encoding="utf-8") as stream:
        if what == "document":
            stream.write(json.dumps({"text": "\n".join(texts[: len(texts) // 4] * times)}) + "\n")
        else:
            for text in itertools.chain.from_iterable(itertools.repeat(texts, times)):
                stream.write(text)
    return path


def _row(
    name: str, what: str, seconds: list[float], made: Manifest, ratio: Spread | None = None, peak: float | None = None
) -> dict[str, Cell]:
    median = statistics.median(seconds) if seconds else None
    return {
        "what": name,
        "of": what,
        "ms": Spread.of([1e3 * each for each in seconds]) if seconds else None,
        "mb_per_second": made.text_bytes / 1e6 / median if median else None,
        "tokens_per_second": made.tokens / median if median else None,
        "ratio": ratio,
        "peak_mib": peak,
    }


def _loading(run: str) -> tuple[dict[str, Cell], float]:
    """A run's loader, beside the steps that the run has recorded."""
    folder = find_run(run)
    job = load(folder / CONFIG_FILE, [], JobConfig)
    blend = Blend.open(job.data, job.train.global_batch_size)
    loader = build_loader(job, blend, rank=0, world_size=1)
    loader.batch(0)
    times = [timed(lambda step=step: loader.batch(step)) for step in range(1, _BATCHES + 1)]  # type: ignore[misc]
    step_s = recorded_step_s(folder)
    share = Spread.of([each / step_s for each in times])
    row: dict[str, Cell] = {
        "what": "loader",
        "of": f"{job.train.global_batch_size} x {job.data.sequence_length}, beside a step of {1e3 * step_s:,.0f} ms",
        "ms": Spread.of([1e3 * each for each in times]),
        "mb_per_second": None,
        "tokens_per_second": job.train.global_batch_size * job.data.sequence_length / statistics.median(times),
        "ratio": share,
        "peak_mib": None,
    }
    return row, share.median


def recorded_step_s(run: Path) -> float:
    """Seconds of a step, the median of a run's records.

    Raises:
        UserError: it has none.
    """
    recorded = [record["step_ms"] for record in read_metrics(run / METRICS_FILE)]
    if not recorded:
        raise UserError(f"{run}: no step is recorded yet; the first record comes after train.log_every steps")
    return statistics.median(recorded) / 1e3
