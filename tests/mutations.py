"""Deliberate mistakes, one at a time in a copy of the tree, and whether the tests of that room catch each.

    python -m tests.mutations            all of them, as rows of a table
    python -m tests.mutations NAME ...   some

Kernels for GPUs are left out here, as their tests take minutes in Triton's interpreter. `broken_rules.py` and
`breakages.py` (in tests/offload) break the rules of the tables from within; these are edits of the source.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 600
_TREE = ("kernels", "model", "offload", "train", "launch", "tests", "configs", "setup.cfg")


class Mutation(NamedTuple):
    """A piece of text that stands once in a file, what takes its place, and the tests that must notice."""

    name: str
    file: str
    old: str
    new: str
    tests: str


class Verdict(NamedTuple):
    """`caught`, `survived`, or why there is no verdict; and the first test that failed."""

    outcome: str
    test: str = ""


MUTATIONS = [
    Mutation(
        "gather: gradients of a row summed backwards",
        "kernels/gather/__init__.py",
        "sorted_N, order_N = index_N.to(torch.int32).sort(stable=True)",
        "sorted_N, order_N = index_N.sort()[0], len(index_N) - 1 - index_N.flip(0).argsort(stable=True)",
        "tests/kernels/gather/test_gather.py",
    ),
    Mutation(
        "deduplicate: rows from 2^32 on sorted as 32-bit integers",
        "kernels/deduplicate/__init__.py",
        ">= 2**32",
        ">= 2**33",
        "tests/kernels/deduplicate",
    ),
    Mutation(
        "gate: a slope where the square root is clamped",
        "kernels/gate/reference.py",
        "torch.where(size_BTM < CLAMP, 0.0, dscore_BTM * slope_BTM)",
        "dscore_BTM * slope_BTM",
        "tests/kernels/gate/test_gate.py",
    ),
    Mutation(
        "hash: an n-gram reaches one token into the document before",
        "kernels/hash/reference.py",
        "positions_BT >= distance",
        "positions_BT >= distance - 1",
        "tests/kernels/hash/test_hash.py",
    ),
    Mutation(
        "initial rows: columns numbered from 0",
        "kernels/records/row_init.py",
        "torch.arange(1, dim + 1",
        "torch.arange(0, dim",
        "tests/kernels/records/test_row_init.py",
    ),
    Mutation(
        "Adam: weights said to rest that still move",
        "kernels/rows/adam.py",
        "rows.weights_UD.abs() * 2.0**-26",
        "rows.weights_UD.abs() * 2.0**-20",
        "tests/kernels/rows/test_adam.py",
    ),
    Mutation(
        "RMSprop: a gradient's mean square is not weighted",
        "kernels/rows/rowwise.py",
        "add_(_mean_square(grad_UD, scratch_UD), alpha=1 - beta2)",
        "add_(_mean_square(grad_UD, scratch_UD))",
        "tests/kernels/rows/test_rowwise.py",
    ),
    Mutation(
        "stochastic rounding: a NaN's payload carries into its sign",
        "kernels/rows/stochastic_rounding.py",
        "torch.where(values.isfinite(), rounded, _keep(values))",
        "rounded",
        "tests/kernels/rows/test_stochastic_rounding.py",
    ),
    Mutation(
        "addresses: two sub-tables share a prime",
        "offload/addresses/hashing.py",
        "                taken.add(prime)\n",
        "",
        "tests/offload/addresses",
    ),
    Mutation(
        "addresses: all layers have the same multipliers",
        "offload/addresses/hashing.py",
        "seed + _LAYER_SEED * layer",
        "seed + _LAYER_SEED",
        "tests/offload/addresses",
    ),
    Mutation(
        "addresses: the fingerprint forgets the padding token",
        "offload/addresses/hashing.py",
        '            "pad_id": vocabulary.pad_id,\n',
        "",
        "tests/offload/addresses",
    ),
    Mutation(
        "compression: capitals stay apart",
        "offload/addresses/compression.py",
        "            normalizers.Lowercase(),\n",
        "",
        "tests/offload/addresses",
    ),
    Mutation(
        "sharding: a rank takes the first row of the next",
        "offload/plan/sharding.py",
        "ends += [base + owned.start, base + owned.stop]",
        "ends += [base + owned.start, base + owned.stop + 1]",
        "tests/offload/plan",
    ),
    Mutation(
        "plan: ranks agree on the fewest rows, not the most",
        "offload/plan/plan.py",
        "dist.ReduceOp.MAX",
        "dist.ReduceOp.MIN",
        "tests/offload/plan",
    ),
    Mutation(
        "exchange: one rank does not round what several would",
        "offload/plan/exchange.py",
        "return owned if dtype == torch.float32 else RowValues(owned.tensor().to(dtype).to(torch.float32))",
        "return owned",
        "tests/offload/test_tables.py",
    ),
    Mutation(
        "loader: sequences come in the order of the epoch's documents",
        "train/data/batches/reader.py",
        "self.epoch(int(epoch)).sequences[place_B[mine]]",
        "place_B[mine]",
        "tests/train/data/batches/test_loader.py",
    ),
    Mutation(
        "loader: its identity forgets the seed",
        "train/data/batches/timetable.py",
        '            "seed": self.seed,\n',
        "",
        "tests/train/data/batches/test_loader.py",
    ),
    Mutation(
        "packing: a document's last token is to predict the next document",
        "train/data/batches/packing.py",
        "    label_F[piece_ends_P[ended_P]] = IGNORED\n",
        "",
        "tests/train/data/batches/test_packing.py",
    ),
    Mutation(
        "Muon: no Nesterov momentum",
        "train/optim/backbone.py",
        "update = gradient.lerp(momentum, self._config.momentum)",
        "update = momentum.clone()",
        "tests/train/engine/test_engine.py",
    ),
    Mutation(
        "Muon: scaled by the shorter side of a matrix",
        "train/optim/muon.py",
        "scale = rms * max(rows, columns) ** 0.5",
        "scale = rms * min(rows, columns) ** 0.5",
        "tests/train/optim",
    ),
    Mutation(
        "schedule: the warm-up begins a step late",
        "train/optim/schedule.py",
        "return (step + 1) / config.warmup_steps",
        "return step / config.warmup_steps",
        "tests/train/optim/test_schedule.py",
    ),
    Mutation(
        "engine: what ranks hold in copies counts once for each in the norm",
        "train/engine/engine.py",
        "copies = dist.get_world_size(part.group) if part.replicated else 1",
        "copies = 1",
        "tests/train/engine/test_engine.py",
    ),
    Mutation(
        "balance: counts of a step are not forgotten",
        "model/balance.py",
        "(step_E.to(layer.choice_bias.dtype))\n            layer.tokens_per_expert.zero_()\n",
        "(step_E.to(layer.choice_bias.dtype))\n",
        "tests/model/test_balance.py",
    ),
    Mutation(
        "convolution: taps one token apart, not one n-gram",
        "model/engram.py",
        "distance = tap * max(self.config.orders)",
        "distance = tap",
        "tests/model/test_engram.py",
    ),
]


def judge(mutation: Mutation) -> Verdict:
    """Runs the mutation's tests over a copy of the tree that has it."""
    times = (ROOT / mutation.file).read_text(encoding="utf-8").count(mutation.old)
    if times != 1:
        return Verdict(f"its text is {times} times in {mutation.file}, not once: write it anew")
    with tempfile.TemporaryDirectory(prefix="engram-mutation-") as folder:
        copy = Path(folder, "tree")
        copy.mkdir()
        for name in _TREE:
            (shutil.copytree if (ROOT / name).is_dir() else shutil.copy2)(ROOT / name, copy / name)
        mutated = copy / mutation.file
        mutated.write_text(mutated.read_text(encoding="utf-8").replace(mutation.old, mutation.new), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "--tb=no", "-rfE", "-p", "no:xdist", mutation.tests]
        try:
            done = subprocess.run(
                command,
                cwd=copy,
                env=os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return Verdict("caught", "no test ended")
    return verdict_of(done.returncode, done.stdout)


def verdict_of(code: int, output: str) -> Verdict:
    """What pytest's exit code and output say: 0 that all passed, 1 that a test failed, others that it could not run."""
    failed = re.search(r"^(?:FAILED|ERROR) (\S+::\S+)", output, re.MULTILINE)
    if code == 0:
        return Verdict("survived")
    if code == 1 and failed:
        return Verdict("caught", failed[1])
    return Verdict(f"pytest could not run its tests (exit code {code})", output.strip()[-200:])


def main() -> None:
    """Prints a row for each mutation; exits with 1 if one was not caught."""
    chosen = [mutation for mutation in MUTATIONS if not sys.argv[1:] or mutation.name in sys.argv[1:]]
    verdicts = []
    for mutation in chosen:
        verdicts.append(judge(mutation))
        print(f"| {mutation.name} | `{mutation.file}` | {verdicts[-1].outcome} | `{verdicts[-1].test}` |", flush=True)
    sys.exit(any(verdict.outcome != "caught" for verdict in verdicts))


if __name__ == "__main__":
    main()
