"""How long steps wait for a store by URL whose server answers late: emulated on the loopback interface.

Run it as `python -m tests.train.data.latency`. A process of its own serves a store of drawn tokens, and is silent for a
while before each answer. Steps take as long as they are told, asleep; a thread makes batches ahead, as a run's planner
does. Bandwidth is that of the loopback interface.
"""

import argparse
import json
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from tests.train.data.server import serving
from tests.train.data.text import small_tokenizer
from train.data.batches.loader import Loader
from train.data.blend import Blend
from train.data.config import DataConfig
from train.data.preparation.encode import Chunk
from train.data.preparation.writer import StoreWriter

_SEQUENCES, _LENGTH, _DOCUMENT = 16, 256, 2048
_LOOK_AHEAD = 3  # plans of a run with `offload.depth` 2


def write_store(folder: Path, tokens: int) -> None:
    """A store of documents of equal lengths."""
    tokenizer, generator = small_tokenizer(), np.random.default_rng(0)
    folder.mkdir()
    with StoreWriter(folder, tokenizer) as writer:
        for _ in range(0, tokens, 1 << 20):
            drawn = generator.integers(2, tokenizer.vocab_size, (1 << 20) // _DOCUMENT * _DOCUMENT, dtype=np.uint16)
            drawn[_DOCUMENT - 1 :: _DOCUMENT] = tokenizer.eos_id
            lengths = np.full(len(drawn) // _DOCUMENT, _DOCUMENT, np.int32)
            writer.append(Chunk(drawn, lengths, 0, 2 * len(drawn)))
        writer.finish(bad=0, passed_over={}, sources=["drawn"], options={})


def _serve(folder: Path, delay_s: float, told: Connection) -> None:
    with serving() as server:
        server.delay_s = lambda number: delay_s
        server.files = {f"/web/{path.name}": path.read_bytes() for path in folder.iterdir()}
        told.send(server.url)
        told.recv()


@contextmanager
def served(folder: Path, delay_s: float) -> Iterator[str]:
    """The URL of a store that another process serves."""
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(folder, delay_s, there), daemon=True)
    process.start()
    yield f"{here.recv()}/web"
    here.send(None)
    process.join()


def waits(data: DataConfig, *, ahead: int, fetch_ahead: int, steps: int, step_s: float) -> list[float]:
    """Seconds for which each step waits for its batch."""
    blend = Blend.open(data, _SEQUENCES)
    loader = Loader(
        blend.sources, split="train", phases=blend.phases, sequence_length=_LENGTH, global_batch_size=_SEQUENCES,
        micro_batch_size=_SEQUENCES, seed=1, validation_fraction=0.01, best_fit=False, shuffle_window=None,
        fetch_ahead=fetch_ahead,
    )  # fmt: skip
    found = []
    with ThreadPoolExecutor(1) as planner:
        coming = deque(planner.submit(loader.batch, step) for step in range(ahead + 1))
        for step in range(steps):
            start = time.perf_counter()
            coming.popleft().result()
            found.append(time.perf_counter() - start)
            if ahead:
                coming.append(planner.submit(loader.batch, step + ahead + 1))
            time.sleep(step_s)
            if not ahead:
                coming.append(planner.submit(loader.batch, step + 1))
    return found


def main() -> None:
    """Prints a line of JSON for each way to read the store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latency-ms", type=float, default=20.0)
    parser.add_argument("--step-ms", type=float, default=1000.0)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--shards", type=int, default=128)
    told = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_store(folder / "web", told.shards << 19)
        with served(folder / "web", told.latency_ms / 1e3) as url:
            # Room for half of the store: every other sequence needs a shard that is not there.
            limit = told.shards << 19
            for name, path, ahead, fetch_ahead in (
                ("local", str(folder / "web"), _LOOK_AHEAD, 16),
                ("by URL, nothing ahead", url, 0, 0),
                ("by URL, batches ahead", url, _LOOK_AHEAD, 0),
                ("by URL, batches and shards ahead", url, _LOOK_AHEAD, 16),
            ):
                data = DataConfig(path=path, cache=str(folder / name), cache_bytes=limit)
                start = time.perf_counter()
                found = sorted(
                    waits(data, ahead=ahead, fetch_ahead=fetch_ahead, steps=told.steps, step_s=told.step_ms / 1e3)
                )
                figures = {"median": found[len(found) // 2], "p90": found[len(found) * 9 // 10], "most": found[-1]}
                line = {key: round(1e3 * value, 1) for key, value in figures.items()}
                seconds = round(time.perf_counter() - start, 1)
                print(json.dumps({"store": name, "wait_ms": line, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
