"""On a GPU, the training loop makes the host wait where the design says so, and nowhere else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command_line import write_job
from tests.distributed import free_port

# Trains in this process, with a warning where the host waits for the device; prints the places within our packages.
PROGRAM = """
import json, sys, threading, traceback, warnings
import torch
from train.config.job import JobConfig
from train.config.file import load
from train.run import train
from train.trainer import Trainer

places, step, watching = set(), Trainer.train_step, False

def noted(function):
    def call(*args, **kwargs):
        # Other threads may wait: the loop does not wait for them.
        if watching and threading.current_thread() is threading.main_thread():
            places.add(function.__qualname__ + " of " + traceback.extract_stack(limit=2)[0].filename)
        return function(*args, **kwargs)
    return call

# What torch's own debug mode does not see.
torch.cuda.synchronize = noted(torch.cuda.synchronize)
for kind in (torch.cuda.Stream, torch.cuda.Event):
    kind.synchronize = noted(kind.synchronize)

def watched(self, number):
    global watching
    if number < 4:  # kernels are compiled and memory is taken
        return step(self, number)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        watching = True
        try:
            return step(self, number)
        finally:
            watching = False
            torch.cuda.set_sync_debug_mode("default")
            places.update(warning.filename for warning in found if "synchron" in str(warning.message))

Trainer.train_step = watched
train(load(sys.argv[1], sys.argv[2:], JobConfig))
print("WAITS", json.dumps(sorted(places)))
"""
OURS = ("kernels", "model", "offload", "train")
ALLOWED = {"train/engine/engine.py", "train/trainer.py"}
"""Where the norm of the gradient is read: the step is taken or skipped by it."""
PLANNERS = {"kernels/deduplicate/together.py"}
"""Where the planner's thread waits, and only it: torch's debug mode does not tell threads apart."""


@pytest.mark.gpu
@pytest.mark.parametrize(("mode", "planner"), [("window", "cpu"), ("resident", "cpu"), ("window", "device")])
def test_the_host_waits_for_the_gradients_norm_alone(mode: str, planner: str, corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    job = write_job(tmp_path, corpus, train={"steps": 8, "dtype": "bf16", "log_every": 8}, checkpoint={"every": None})
    # What FlexAttention and the grouped product of the experts take.
    sizes = {
        "attention.qk_nope_dim": 16,
        "attention.qk_rope_dim": 16,
        "attention.v_dim": 16,
        "moe.expert_hidden_size": 32,
    }
    overrides = [
        f"offload.mode={mode}",
        f"offload.planner={planner}",
        "offload.depth=2",
        "offload.window_rows=3500",
        "eval.every=8",
    ]
    overrides += ["data.sequence_length=128", *(f"model.{key}={value}" for key, value in sizes.items())]
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    ranks["MASTER_PORT"] = str(free_port())
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(job), *overrides],
        capture_output=True,
        text=True,
        check=False,
        cwd=root,
        env=os.environ | ranks,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("WAITS "))
    places = json.loads(line.removeprefix("WAITS "))
    asked = [place for place in places if " of " in place]
    assert not asked, "the host waits for all that the device was given"
    assert not [place for place in places if "deepspeed" in Path(place).parts], "DeepSpeed makes the host wait"
    within = [Path(place).relative_to(root) for place in places if Path(place).is_relative_to(root)]
    found = {str(place) for place in within if place.parts[0] in OURS}
    assert "train/engine/engine.py" in found, "the wait that there must be was not seen: the test would prove nothing"
    allowed = ALLOWED | (PLANNERS if planner == "device" else set())
    assert found <= allowed, f"the host waits in {found - allowed}"
