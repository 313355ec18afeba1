"""What `engram launch` writes for each launcher: correct shell, valid manifests, one description behind all of them."""

import json
import os
import shlex
import shutil
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from launch.cluster.launchers import LAUNCHERS, _copy
from launch.cluster.layout import Launch, Rendered
from launch.commands.launch import _LAUNCHERS
from tests.command_line import engram, fresh_engram, losses, train, write_job
from train.config.file import load
from train.config.job import JobConfig
from train.errors import UserError

FULL = [
    "run.nproc=2",
    "run.name=A_run.1",
    "launch.nodes=3",
    "launch.hosts=[n1, n2, n3]",
    "launch.min_nodes=2",
    "launch.time_limit_min=90",
    "launch.interface=ib0",
    'launch.environment={NOTE: "it\'s 5 $"}',
    "launch.setup=[module load cuda]",
    "launch.slurm={partition: gpu, account: us, cpus_per_rank: 6, options: [--qos=long]}",
    "launch.kubernetes={image: 'reg/engram:1', cpus: 8, memory_gib: 64, volumes: {/workspace/runs: runs}}",
    "checkpoint.grace_s=40",
]
PLAIN = [
    "run.nproc=1",
    "launch.hosts=[n1]",
    "launch.gpus=0",
    "launch.slurm.cpus_per_rank=1",
    "launch.slurm.requeue=false",
    "launch.kubernetes.image=x",
]

NO_DISK = ["run.local_checkpoints=true"]


def rendered(launcher: str, folder: Path, *overrides: str) -> Rendered:
    job = load(write_job(folder, folder / "corpus"), overrides, JobConfig)
    return LAUNCHERS[launcher](Launch.next(job))


@pytest.fixture(params=[(launcher, name) for launcher in _LAUNCHERS for name in ("full", "plain")], ids=" ".join)
def every_kind(request: pytest.FixtureRequest, tmp_path: Path) -> Rendered:
    launcher, name = request.param
    return rendered(launcher, tmp_path, *(FULL if name == "full" else PLAIN))


def scripts(found: Rendered) -> dict[str, str]:
    """Every shell script of a launch, those in a manifest too."""
    texts = dict(found.files)
    if "job.yaml" in texts:
        texts |= next(yaml.safe_load_all(texts["job.yaml"]))["data"]
    return {name: text for name, text in texts.items() if text.startswith("#!")}


def test_every_script_passes_shellcheck(every_kind: Rendered, tmp_path: Path) -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert shellcheck is not None
    assert scripts(every_kind)
    for name, text in scripts(every_kind).items():
        (tmp_path / name).write_text(text)
        found = subprocess.run(
            [shellcheck, "--shell=bash", tmp_path / name], capture_output=True, text=True, check=False
        )
        assert found.returncode == 0, found.stdout


def test_the_launchers_are_those_of_the_command() -> None:
    assert tuple(LAUNCHERS) == _LAUNCHERS


@pytest.mark.parametrize("overrides", [FULL, PLAIN], ids=["full", "plain"])
def test_the_manifests_are_valid_and_keep_a_run_that_saved(overrides: list[str], tmp_path: Path) -> None:
    documents = list(yaml.safe_load_all(rendered("kubernetes", tmp_path, *overrides).files["job.yaml"]))
    version = "1.31"
    for document in documents:
        kubernetes_validate.validate(document, version, strict=True)
    config, service, job = documents
    assert [document["kind"] for document in documents] == ["ConfigMap", "Service", "Job"]
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert spec["completions"] == spec["parallelism"]
    assert service["spec"]["selector"]["job-name"] == job["metadata"]["name"] == pod["subdomain"]
    ignored = spec["podFailurePolicy"]["rules"][0]
    assert (ignored["action"], ignored["onExitCodes"]["values"]) == ("Ignore", [75])
    saved = yaml.safe_load(config["data"]["config.yaml"])
    assert saved["checkpoint"]["interrupted_exit"] == 75
    compiled = Path(saved["run"]["dir"], saved["run"]["name"], "compiled")
    assert f"export NUMBA_CACHE_DIR={Path('/workspace') / compiled}\n" in config["data"]["rank.sh"]
    assert pod["terminationGracePeriodSeconds"] > saved["checkpoint"]["grace_s"]
    shared_memory = next(volume for volume in pod["volumes"] if volume["name"] == "shm")
    assert shared_memory["emptyDir"]["medium"] == "Memory"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job | {"spec": spec | {"completions": "many"}}, version, strict=True)


def test_nodes_ranks_and_grace_are_the_same_on_every_launcher(tmp_path: Path) -> None:
    texts = {launcher: rendered(launcher, tmp_path, *FULL) for launcher in _LAUNCHERS}
    batch = texts["slurm"].files["job.sbatch"]
    for option in (
        *("--nodes=3", "--ntasks-per-node=2", "--cpus-per-task=6", "--gpus-per-node=2", "--time=90", "--qos=long"),
        *("--partition=gpu", "--account=us", "--signal=TERM@70", "--requeue"),
    ):
        assert f"#SBATCH {option}\n" in batch
    assert 'case "$code" in 75|143) scontrol requeue' in batch
    assert texts["slurm"].launch.job.checkpoint.interrupted_exit == 75
    assert texts["hosts"].launch.job.checkpoint.interrupted_exit == 0
    node = texts["hosts"].files["node.sh"]
    assert "--nnodes=2:3 --nproc-per-node=2 " in node
    assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=40" in node
    assert texts["hostfile"].files["hostfile"] == "n1 slots=2\nn2 slots=2\nn3 slots=2\n"
    for launcher in ("local", "hosts", "hostfile", "slurm"):
        rank = texts[launcher].files["rank.sh"]
        assert "GLOO_SOCKET_IFNAME=ib0" in rank
        assert "unset OMP_NUM_THREADS" in rank
        assert "module load cuda" in rank


def test_agents_meet_at_the_first_host_and_start_ranks_of_the_copied_code(tmp_path: Path) -> None:
    from torch.distributed.run import parse_args

    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$PYTHONPATH" "$@"\n')
    python.chmod(0o755)
    job = load(write_job(tmp_path, tmp_path / "corpus"), ["run.nproc=2", "launch.hosts=[n1, n2]"], JobConfig)
    launch = replace(Launch.next(job), python=str(python))
    script = tmp_path / "node.sh"
    script.write_text(LAUNCHERS["hosts"](launch).files["node.sh"])
    for number, name in enumerate(("n1", "n2")):
        done = subprocess.run(["bash", script, str(number), "--attached"], capture_output=True, text=True, check=True)
        path, *words = done.stdout.splitlines()
        assert path == str(launch.code)
        assert words[:5] == ["-P", "-m", "launch.cluster.node", "--attached", "--"]
        assert words[5:9] == [str(python), "-P", "-m", "launch.cluster.agent"]
        asked = parse_args(words[9:])
        assert (asked.nnodes, asked.nproc_per_node) == ("2", "2")
        assert (asked.rdzv_endpoint, asked.local_addr) == (f"n1:{launch.port}", name)
        assert f"is_host={int(number == 0)}," in asked.rdzv_conf
        assert [asked.training_script, *asked.training_script_args] == ["bash", str(launch.folder / "rank.sh")]


MISSING = {
    "hosts without hosts": ("hosts", ["run.nproc=1"], "launch.hosts is empty: name the hosts"),
    "hostfile without hosts": ("hostfile", ["run.nproc=1"], "launch.hosts is empty: name the hosts"),
    "ranks a node": ("hosts", ["launch.hosts=[a]"], "run.nproc is null: set it to the number of ranks per node"),
    "cores a rank": ("slurm", ["run.nproc=1"], "launch.slurm.cpus_per_rank is null"),
    "an image": ("kubernetes", ["run.nproc=1"], "launch.kubernetes.image is null"),
    "one host in the word of another": (
        "hosts",
        ["launch.hosts=[n1 n2]"],
        r"launch.hosts.*, got \"n1 n2\"",
    ),
    "an option for a host": ("hosts", ["launch.hosts=[-oProxyCommand=x]"], "launch.hosts.*, got"),
    "a variable's name": (
        "local",
        ["launch.environment={A B: c}"],
        'launch: environment: "A B" is not a variable name',
    ),
    "a folder that is quoted": (
        "hostfile",
        ["run.nproc=1", "launch.hosts=[a]", "run.dir=my runs"],
        "my runs.*: DeepSpeed's launcher does not quote paths",
    ),
    "no shared disk": (
        "slurm",
        [*PLAIN, *NO_DISK],
        "run.local_checkpoints: Slurm's nodes read the launch from run.dir",
    ),
    "a relative mount": (
        "kubernetes",
        ["launch.kubernetes.volumes={runs: claim}"],
        'launch.kubernetes: volumes: "runs" is no folder in the container: one that begins with /',
    ),
    "a relative workdir": ("kubernetes", ["launch.kubernetes.workdir=here"], 'workdir: "here" is no folder'),
    "a host twice": ("hosts", ["launch.hosts=[a, a]"], "launch: hosts names a host twice"),
    "more than there are": (
        "hosts",
        ["launch.hosts=[a]", "launch.min_nodes=2"],
        "min_nodes 2 is more than the 1 hosts",
    ),
}


@pytest.mark.parametrize("what", MISSING)
def test_what_a_launcher_lacks_is_told_with_the_key(what: str, tmp_path: Path) -> None:
    launcher, overrides, message = MISSING[what]
    with pytest.raises(UserError, match=message):
        rendered(launcher, tmp_path, *overrides)


@pytest.mark.parametrize("launcher", ["hosts", "hostfile"])
def test_hosts_that_share_no_disk_are_sent_the_launch(launcher: str, tmp_path: Path) -> None:
    sent = rendered(launcher, tmp_path, *PLAIN, *NO_DISK, "launch.hosts=[n1, n2]", "launch.ssh=true").copies
    assert [copy[-2] for copy in sent] == ["n1", "n2"]
    assert rendered(launcher, tmp_path, *PLAIN, "launch.ssh=true").copies == []


def test_who_starts_hosts_that_share_no_disk_is_told_to_copy_the_launch(tmp_path: Path) -> None:
    assert rendered("hosts", tmp_path, *PLAIN, *NO_DISK).told.startswith("Copy ")


def test_a_launch_that_cannot_be_sent_names_the_host(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"n1: cannot copy .* there \(exit code 3\)"):
        _copy(tmp_path, ["sh", "-c", "cat > /dev/null; exit 3", "n1", "unpack"])


def test_a_folder_of_any_name_is_one_word_of_the_batch_script(tmp_path: Path) -> None:
    folder = tmp_path / "50% of mine"
    batch = rendered("slurm", tmp_path, *PLAIN, f"run.dir={folder}").files["job.sbatch"]
    (output,) = [line for line in batch.splitlines() if line.startswith("#SBATCH --output=")]
    (path,) = shlex.split(output.removeprefix("#SBATCH --output="))
    assert path == f"{tmp_path}/50%% of mine/small/launches/0001/job.log"


def listing(folder: Path) -> dict[str, Any]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_dry_run_prints_what_would_run_and_touches_nothing(tmp_path: Path) -> None:
    job = write_job(tmp_path, tmp_path / "corpus")
    before = listing(tmp_path)
    dry = engram("launch", job, "--on", "slurm", "--dry-run", *FULL)
    assert dry.returncode == 0, dry.stderr
    assert listing(tmp_path) == before
    told = engram("launch", job, "--on", "slurm", *FULL)
    assert told.returncode == 0, told.stderr
    folder = tmp_path / "runs" / "A_run.1" / "launches" / "0001"
    assert f"sbatch {folder / 'job.sbatch'}" in told.stdout
    for name in ("job.sbatch", "rank.sh"):
        assert (folder / name).read_text() in dry.stdout
    assert (folder / "code" / "launch" / "cli.py").exists()
    assert (folder / "rank.sh").stat().st_mode & stat.S_IXUSR
    assert "queue" in engram("launch", job, "--on", "hosts", "--submit", *FULL).stderr


@pytest.mark.long
def test_a_launch_here_runs_the_copied_code_with_the_copied_config_and_a_second_one_goes_on(
    corpus: Path, tmp_path: Path
) -> None:
    job = write_job(tmp_path, corpus, train={"steps": 2}, checkpoint={"every": 1})
    settings = ["run.nproc=2", "launch.gpus=0", "launch.environment={NOTE: here}"]
    first = fresh_engram("launch", job, *settings)
    assert first.returncode == 0, first.stderr
    second = fresh_engram("launch", job, *settings, "train.steps=4", "launch.nodes=2")
    assert second.returncode == 0, second.stderr
    assert "starting on this machine only" not in first.stderr
    assert "starting on this machine only: give --on to start all 2 nodes" in second.stderr
    run = tmp_path / "runs" / "small"
    train(job, "run.name=straight", "train.steps=4", "--nproc", "2")
    assert len(losses(run)) == 4
    assert [path.name for path in sorted((run / "launches").iterdir())] == ["0001", "0002"]
    for number, steps in (("0001", 2), ("0002", 4)):
        copied = load(run / "launches" / number / "config.yaml", [], JobConfig)
        assert copied.train.steps == steps
    code = run / "launches" / "0002" / "code" / "train" / "run.py"
    code.write_text("raise RuntimeError('the copy')\n")
    again = subprocess.run(["bash", run / "launches" / "0002" / "rank.sh"], capture_output=True, text=True, check=False)
    assert "the copy" in again.stderr


def test_the_first_failure_is_the_oldest_that_is_not_a_lost_connection(tmp_path: Path) -> None:
    from launch.cluster.failure import first_failure
    from launch.local.failures import RankReport

    assert first_failure(tmp_path) is None
    for name, kind, text, time in (
        ("rank0", "peer", "Traceback\nConnectionResetError", 1.0),
        ("rank1", "crash", "Traceback\nZeroDivisionError", 3.0),
        ("rank2", "user", "the window is too small", 2.0),
    ):
        (tmp_path / name).write_text(json.dumps({"kind": kind, "text": text, "time": time}))
    assert first_failure(tmp_path) == "the window is too small"
    (tmp_path / "rank2").unlink()
    assert first_failure(tmp_path) == "rank 1 failed\nTraceback\nZeroDivisionError"
    assert RankReport.read(tmp_path / "rank0") is not None


@pytest.mark.parametrize(("attached", "code"), [(False, 7), (True, 143)])
def test_a_node_ends_with_its_ranks_code_or_with_the_connection_that_started_it(attached: bool, code: int) -> None:
    agent = (
        "import os, sys, time; time.sleep(60)"
        if attached
        else ("import os, sys; open(os.environ['ENGRAM_EXIT_CODE'], 'x').write('7'); sys.exit(1)")
    )
    words = [sys.executable, "-m", "launch.cluster.node", *(["--attached"] if attached else []), "--", sys.executable]
    node = subprocess.run([*words, "-c", agent], stdin=subprocess.DEVNULL, timeout=30, check=False)
    assert node.returncode == code
