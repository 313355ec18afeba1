"""Greedy tokens per second of a trained run, texts one by one and together, in turns.

python -m tests.train.use.generation_speed runs/tiny --texts 32 --tokens 64
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from train.checkpoint.saved_tables import SavedTables
from train.use.generation import TextBatch
from train.use.saved_run import SavedRun
from train.use.together import Asked, continue_together

TEXT = 'import os\n\n\ndef main(argv):\n    """Returns the number of arguments."""\n    return len(argv)\n'


def requests(run: SavedRun, texts: int, tokens: int) -> list[Asked]:
    """Prompts of several lengths."""
    ids = run.tokenizer.encode(TEXT * 4)
    return [
        Asked(ids[: 8 + 3 * number % 56], num_tokens=tokens, temperature=0, generator=torch.Generator())
        for number in range(texts)
    ]


def timed(action: Callable[[], list[Asked]]) -> tuple[float, list[Asked]]:
    start = time.perf_counter()
    found = action()
    return sum(len(each.found) for each in found) / (time.perf_counter() - start), found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--texts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    run = SavedRun.open(asked.run)
    model, tables = run.model(), run.tables()
    calls = 0

    def counted(*arguments: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        return look_up(*arguments, **options)

    look_up = SavedTables.look_up.__get__(tables)
    tables.look_up = counted  # type: ignore[method-assign,union-attr]

    def generate(batch_tokens: int) -> list[Asked]:
        found = requests(run, asked.texts, asked.tokens)
        continue_together(
            lambda: TextBatch(model, tables, run.tokenizer.pad_id), found, vocab_size=run.tokenizer.vocab_size,
            eos_id=-1, batch_tokens=batch_tokens,
        )  # fmt: skip
        return found

    speeds: dict[str, list[float]] = {"one by one": [], "together": []}
    for _ in range(asked.rounds):
        texts = []
        for name, batch_tokens in (("one by one", 1), ("together", 1 << 20)):
            before = calls
            speed, found = timed(lambda batch_tokens=batch_tokens: generate(batch_tokens))  # type: ignore[misc]
            speeds[name].append(speed)
            texts.append([each.found for each in found])
            print(f"{name}: {speed:,.1f} tokens/s, {calls - before} look-ups of rows", flush=True)
        same = sum(one == other for one, other in zip(*texts, strict=True))
        print(f"{same} of {asked.texts} texts are equal", flush=True)
    for name, found in speeds.items():
        print(f"{name}: median {statistics.median(found):,.1f}, {min(found):,.1f} to {max(found):,.1f} tokens/s")
    print(f"{statistics.median(speeds['together']) / statistics.median(speeds['one by one']):.2f} times")


if __name__ == "__main__":
    main()
