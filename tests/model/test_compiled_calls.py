"""What torch.compile makes of the blocks for a GPU, counted without one."""

import os
import subprocess
import sys

import pytest
import torch


@pytest.mark.long
@pytest.mark.skipif(not torch.__version__.startswith("2.13"), reason="replaces much of torch 2.13's own")
def test_every_block_is_compiled_as_for_a_gpu_and_counted() -> None:
    command = [sys.executable, "-m", "tests.model.compiled_calls", "configs/bench.yaml"]
    compiled = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=compiled, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    title, *lines = done.stdout.splitlines()
    counted = {name: int(count) for count, name in map(str.split, lines)}
    assert title == f"configs/bench.yaml: the blocks make {sum(counted.values())} calls a micro-batch"
    layers, modules = 8, 2
    for direction in ("", "_backward"):
        assert counted[f"tests.flex_attention{direction}.default"] == layers
        assert counted[f"engram.sinkhorn{direction}.default"] == 2 * layers
        assert counted[f"engram.gate{direction}.default"] == modules
    assert counted["extern_kernels._grouped_mm"] == 2 * 3 * (layers - 1)  # two products, and both gradients of each
    assert counted["triton"] > 10 * layers
