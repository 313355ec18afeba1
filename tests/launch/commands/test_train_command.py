"""`engram train` end to end: what it leaves behind, resuming after a kill, the kinds of jobs it can run."""

import gzip
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.command_line import ENGRAM, TIMEOUT_S, backbone, engram, losses, table_rows, train, write_job
from tests.warm_command import started_warm
from train.page.told_run import ToldRun, flat
from train.report.profile import STEPS_KEY, TRACE_FILE
from train.report.trace import LANE, LANES


def test_a_run_leaves_what_the_design_promises_and_ends_with_a_summary(corpus: Path, tmp_path: Path) -> None:
    here = Path(os.path.relpath(corpus))
    write_job(tmp_path, here, eval={"prompts": ["def "], "sample_tokens": 3})
    job = tmp_path / "seeded.yaml"
    job.write_text("extends: job.yaml\ntrain: {seed: 3}\n")
    result = train(job)
    run = tmp_path / "runs" / "small"
    told = ToldRun(run, 0)
    assert {key for key, value in flat(told.job).items() if value != told.base[0][key]} == {"train.seed"}
    assert told.job.data.path == str(here.absolute())
    names = {"config.yaml", "metrics.jsonl", "summary.json", "log.txt", "checkpoints"}
    assert {path.name for path in run.iterdir()} >= names
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert first.keys() >= {
        *("epoch", "memory.host_bytes"),
        *("step", "loss", "grad_norm", "lr", "tokens", "step_ms", "tokens_per_s"),
        *("offload.stall_ms", "offload.fetch_rows", "offload.hit_rate", "offload.writeback_rows"),
    }
    stages = {name: value for name, value in first.items() if name.startswith("stages.")}
    wanted = ("plan", "fetch", "exchange", "forward", "backward", "reduce", "update", "other")
    assert stages.keys() == {f"stages.{stage}_ms" for stage in wanted}
    assert min(stages.values()) > 0
    assert sum(stages.values()) == pytest.approx(first["step_ms"])
    for wanted in ("validation loss", "unigram entropy", "in host memory through windows", "What to try next"):
        assert wanted in result.stdout
    kept = (run / "summary.json").read_text()
    again = train(run / "config.yaml")
    assert (run / "summary.json").read_text() == kept, "a finished run lost what it knows of its training"
    assert "already has all 5 steps" in again.stdout
    assert losses(run)[-1][1] is not None, "a finished run lost its metrics when it was started again"


@pytest.mark.parametrize(
    "sharding",
    [
        "deepspeed.zero_optimization.stage=3",
        "deepspeed.expert_parallel={enabled: true, autoep_size: 2, preset_model: deepseek_v3}",
    ],
)
def test_a_sample_is_what_the_finished_run_writes(sharding: str, corpus: Path, tmp_path: Path) -> None:
    prompts = ["def main(argv):\n    import ", ""]
    asked = {"prompts": prompts, "sample_tokens": 6, "temperature": 0}
    result = train(write_job(tmp_path, corpus, eval=asked, train={"steps": 2}), sharding, "--nproc", "2", "--json")
    samples = json.loads(result.stdout)["samples"]
    greedy = ("--tokens", "6", "--temperature", "0")
    written = [engram("generate", tmp_path / "runs" / "small", prompt, *greedy).stdout for prompt in prompts]
    assert [f"{sample}\n" for sample in samples] == written
    assert all(len(sample) > len(prompt) for sample, prompt in zip(samples, prompts, strict=True))


def test_json_is_the_only_thing_on_stdout_and_a_measured_run_leaves_a_trace_and_no_checkpoint(
    corpus: Path, tmp_path: Path
) -> None:
    sections = {"train": {"profile": {"first": 4, "steps": 9}}, "checkpoint": {"every": None}}
    unmeasured = "data.validation_fraction=0"
    result = train(write_job(tmp_path, corpus, **sections), unmeasured, "--json", "--nproc", "2")
    summary = json.loads(result.stdout)
    trace = json.loads(gzip.decompress(Path(summary["run"], TRACE_FILE).read_bytes()))
    assert trace[STEPS_KEY] == 2, "of nine steps from the fourth, the run has two"
    for rank in range(2):
        events = [event for event in trace["traceEvents"] if event["pid"] == rank]
        assert any(str(event.get("name")).startswith("Optimizer.step") for event in events)
        names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
        lanes = {names[event["tid"]] for event in events if event.get("cat") == LANE}
        assert lanes | {"plan"} == set(LANES), "the last steps were planned before"
    ends = [
        max(e["ts"] + e["dur"] for e in trace["traceEvents"] if e.get("cat") == LANE and e["pid"] == r) for r in (0, 1)
    ]
    assert abs(ends[0] - ends[1]) < 1e6, "ranks do not share a clock"
    assert not list(Path(summary["run"]).glob("checkpoints/*"))
    assert summary["steps"] == 5
    assert summary["table_bytes"] > summary["window_bytes"] > 0
    assert summary["rows_moved"] > 0
    assert (summary["val_loss"], summary["unigram_entropy"]) == (None, None)


def wait_for(path: Path, at_work: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert at_work(), "the run ended too soon"
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.long  # a cheap case of kills: test_interrupted_runs.py
def test_a_killed_run_continues_bitwise_with_the_same_command(corpus: Path, tmp_path: Path) -> None:
    # At depth 0 the emulated latency makes every step last, so that the kill comes in the middle of the run.
    sections = {
        "train": {"steps": 8},
        "checkpoint": {"every": 3},
        "offload": {"depth": 0, "emulate_link": {"bytes_per_second": 1e9, "latency_s": 0.5}},
    }
    job = write_job(tmp_path, corpus, **sections)
    train(job, "run.name=straight", "offload.emulate_link=null")
    command = [*ENGRAM, "train", str(job), "run.name=killed"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        wait_for(tmp_path / "runs/killed/checkpoints/step-00000003", lambda: process.poll() is None)
        process.send_signal(signal.SIGKILL)
    train(job, "run.name=killed", "offload.depth=3", "offload.emulate_link=null")
    straight, killed = (tmp_path / "runs" / name for name in ("straight", "killed"))
    assert losses(killed) == losses(straight)
    assert table_rows(killed) == table_rows(straight)
    assert backbone(killed) == backbone(straight)


def test_a_checkpoint_of_two_ranks_continues_on_one(corpus: Path, tmp_path: Path) -> None:
    job = write_job(tmp_path, corpus, train={"steps": 4}, checkpoint={"every": 2})
    train(job, "run.name=two", "--nproc", "2")
    train(job, "run.name=changed", "train.steps=2", "--nproc", "2")
    train(job, "run.name=changed", "offload.window_rows=100000", "--nproc", "1")
    two, changed = (losses(tmp_path / "runs" / name) for name in ("two", "changed"))
    assert changed[3][0] == pytest.approx(two[3][0], rel=1e-4)


KINDS = {
    "zero-3-bf16-accumulated-branched": [
        "train.dtype=bf16",
        "train.micro_batch_size=2",
        "deepspeed.zero_optimization.stage=3",
        "offload.depth=2",
        "model.hyper_connections={expansion: 4}",
    ],
    "expert-parallel": [
        "deepspeed.expert_parallel={enabled: true, autoep_size: 2, preset_model: deepseek_v3}",
        "deepspeed.zero_optimization.stage=2",
        "optimizer.name=adamw",
        "model.hyper_connections={expansion: 2}",
    ],
    "no-memory": ["model.engram=null", "deepspeed.zero_optimization.stage=0"],
    "dense": ["model.moe=null", "offload.optimizer.type=rowwise_adagrad"],
}
WHEN_RESUMED = {"dense": ["wandb.mode=offline"]}


@pytest.mark.parametrize(
    "kind", [kind if kind != "dense" else pytest.param(kind, marks=pytest.mark.long) for kind in KINDS]
)
def test_jobs_of_every_kind_train_and_resume_bitwise(kind: str, corpus: Path, tmp_path: Path) -> None:
    sections = {"train": {"steps": 4}, "optimizer": {"learning_rate": 3e-3}, "checkpoint": {"every": 2}}
    job = write_job(tmp_path, corpus, **sections, eval={"every": 4})
    train(job, *KINDS[kind])
    run = tmp_path / "runs" / "small"
    straight, weights = losses(run), backbone(run)
    assert straight[-1][0] < straight[0][0]
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    train(job, *KINDS[kind], *WHEN_RESUMED.get(kind, []))
    assert losses(run) == straight
    assert backbone(run) == weights
    assert bool([*run.glob("wandb/offline-run-*")]) == (kind in WHEN_RESUMED)


def refusal(*arguments: str | Path) -> str:
    """The one line that a wrong `engram train` ends with."""
    result = engram("train", *arguments)
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("Error: ")
    return lines[0]


def test_no_such_config(tmp_path: Path) -> None:
    assert "none.yaml: no such file" in refusal(tmp_path / "none.yaml")


WRONG = {
    "unknown key": (["offload.detph=1"], "did you mean offload.depth?"),
    "wrong type": (["train.steps=many"], "train.steps: expected an integer"),
    "a key that we own": (["deepspeed.train_batch_size=8"], "train.global_batch_size"),
    "unknown DeepSpeed key": (["deepspeed.zero_optimisation={stage: 1}"], "did you mean deepspeed.zero_optimization?"),
    "vocabulary too small": (["model.vocab_size=299"], "set model.vocab_size=300"),
    "no such data": (["data.path=nowhere"], "nowhere"),
    "other tokenizer": (["data.tokenizer=deepseek"], "tokenizer"),
    "window too small": (["offload.window_rows=10"], "set offload.window_rows="),
    "indivisible experts": (
        ["deepspeed.expert_parallel={enabled: true, autoep_size: 2, preset_model: deepseek_v3}",
         "model.moe.num_experts=5"],
        "5",
    ),
    "an endless rate": (["optimizer.learning_rate=.inf"], "optimizer.learning_rate: expected a finite number > 0"),
    "a number that no table has": (
        ["model.engram.rows_per_head=99999999999999999999", "train.seed=-1"], "train.seed: expected an integer >= 0",
    ),
    "no memory for the backbone": (["model.vocab_size=2000000000"], "while 1 rank(s) build it"),
    "no room on disk": (["model.engram.rows_per_head=2000000000000"], "GB are free"),
    "batch not divisible": (["train.global_batch_size=7"], "is not a multiple of micro_batch_size 4"),
    "a name that leaves the folder": (["run.name=.."], "run.name"),
    "nothing to resume": (["checkpoint.resume=must"], "holds no checkpoint"),
    "diverging": (
        ["train.gradient_clipping=null", "optimizer.learning_rate=1e30", "schedule.warmup_steps=0", "train.steps=40",
         "train.max_skipped_steps=2"],
        "3 steps in a row were skipped, the last one step 4: its gradient is not finite",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", WRONG)
def test_a_mistake_is_one_line_that_says_what_to_do(mistake: str, corpus: Path, tmp_path: Path) -> None:
    overrides, expected = WRONG[mistake]
    ranks = "2" if "expert_parallel" in overrides[0] or mistake == "diverging" else "1"
    assert expected in refusal(write_job(tmp_path, corpus), *overrides, "--nproc", ranks)


def test_what_a_run_is_cannot_change_and_its_record_survives_the_attempt(corpus: Path, tmp_path: Path) -> None:
    job = write_job(tmp_path, corpus)
    train(job, "train.steps=1", "--nproc", "1")
    record = tmp_path / "runs" / "small" / "config.yaml"
    before = record.read_text()
    one = ["--nproc", "1"]
    assert "model.engram.rows_per_head (500, now 600)" in refusal(job, "model.engram.rows_per_head=600", *one)
    assert "offload.optimizer.beta1" in refusal(job, "offload.optimizer.beta1=0.5", *one)
    told = (
        "offload.optimizer.state_dtype: the checkpoint's tables were trained with fp32, the config says bf16; restore"
    )
    assert told in refusal(job, "offload.optimizer.state_dtype=bf16", *one)
    assert "choose another run.name" in refusal(job, "checkpoint.resume=never", *one)
    assert record.read_text() == before


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


DAMAGES = {
    "manifest": lambda folder: cut_short(folder / "manifest.json"),
    "index": lambda folder: cut_short(folder / "rank-00000.json"),
    "part": lambda folder: (folder / "rank-00000-000000.safetensors").unlink(),
}


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_and_replaced(corpus: Path, tmp_path: Path) -> None:
    job = write_job(tmp_path, corpus, train={"steps": 4}, checkpoint={"every": 2})
    train(job, "--nproc", "1")
    run = tmp_path / "runs" / "small"
    checkpoints, straight, weights = run / "checkpoints", losses(run), backbone(run)
    newest, mine = checkpoints / "step-00000004", checkpoints / "step-00000004-mine"
    # A folder that the user made: neither picked for resuming nor pruned.
    shutil.copytree(newest, mine)
    for damage in DAMAGES.values():
        damage(newest)
        again = train(job, "--nproc", "1")
        assert "step-00000004 was passed over: " in again.stdout + (run / "log.txt").read_text()
        assert (losses(run), backbone(run)) == (straight, weights)
    for path in (newest, checkpoints / "step-00000002"):
        cut_short(path / "manifest.json")
    assert f"no checkpoint is whole: delete {checkpoints} to start anew" in refusal(job, "--nproc", "1")
    shutil.rmtree(newest)
    shutil.rmtree(checkpoints / "step-00000002")
    train(job, "train.steps=8", "--nproc", "1")
    kept = {path.name for path in checkpoints.iterdir()}
    assert kept == {"step-00000006", "step-00000008", "step-00000004-mine"}


def test_what_cannot_be_written_is_told_before_training(corpus: Path, tmp_path: Path) -> None:
    job = write_job(tmp_path, corpus)
    run = tmp_path / "runs" / "small"
    run.mkdir(parents=True)
    (run / "checkpoints").write_text("")
    assert "checkpoints: " in refusal(job, "--nproc", "1")
    (run / "checkpoints").unlink()
    (run / "summary.json").mkdir()
    assert f"{run}/summary.json: is a directory" in refusal(job, "--nproc", "1")
    assert not (run / "metrics.jsonl").exists()


def test_a_save_that_the_disk_does_not_take_is_told_and_training_goes_on(corpus: Path, tmp_path: Path) -> None:
    """No file may become larger than 300 KiB: a checkpoint's does."""
    job = write_job(tmp_path, corpus, train={"steps": 4}, checkpoint={"every": 2})
    with started_warm(["train", str(job), "--nproc", "1"], cwd=None, environment={"OMP_NUM_THREADS": "1"}) as command:
        resource.prlimit(command.process.pid, resource.RLIMIT_FSIZE, (300 << 10, 300 << 10))
        done = command.result(TIMEOUT_S)
    run = tmp_path / "runs" / "small"
    assert re.search(r"step 2 was not saved: .*: file too large; training goes on", (run / "log.txt").read_text())
    assert len(losses(run)) == 4
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.endswith("rank-00000-000000.safetensors: file too large")
    assert [*(run / "checkpoints").iterdir()] == []


def test_two_runs_do_not_share_a_folder(corpus: Path, tmp_path: Path) -> None:
    slow = {"depth": 0, "emulate_link": {"bytes_per_second": 1e9, "latency_s": 0.5}}
    job = write_job(tmp_path, corpus, train={"steps": 40}, offload=slow)
    with started_warm(["train", str(job), "--nproc", "1"], cwd=None, environment={"OMP_NUM_THREADS": "1"}) as command:
        wait_for(tmp_path / "runs/small/metrics.jsonl", command.process.is_alive)
        assert "another run is at work in it" in refusal(job, "--nproc", "1")


def test_a_window_that_becomes_too_small_saves_the_run_first(corpus: Path, tmp_path: Path) -> None:
    job = write_job(tmp_path, corpus, train={"steps": 6}, checkpoint={"every": 100}, eval={"every": 6})
    needed = re.search(r"step 1 alone needs ([\d,]+) rows", refusal(job, "offload.window_rows=10"))
    assert needed is not None
    window = f"offload.window_rows={needed[1].replace(',', '')}"
    message = refusal(job, window)
    saved = re.search(r"step (\d+) alone needs .* (\d+) steps are saved in", message)
    assert saved is not None, message
    assert int(saved[1]) == int(saved[2]) + 1 > 1
    train(job, "offload.window_rows=2000")
    train(job, "offload.window_rows=2000", "run.name=straight")
    assert losses(tmp_path / "runs" / "small") == losses(tmp_path / "runs" / "straight")
