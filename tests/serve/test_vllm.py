"""vLLM itself serves exports by the plugin: the tokens are ours, whatever else is in the batch or in the cache."""

import bisect
import json
import os
import random
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.command_line import engram, train, write_job
from tests.distributed import free_port
from tests.train.huggingface.exports import KINDS
from train.use.generation import TextBatch
from train.use.saved_run import SavedRun

ROOT = Path(__file__).parents[2]
LENGTH, TOKENS, PROMPTS = 256, 24, 50

pytestmark = pytest.mark.long


@dataclass(frozen=True)
class Vllm:
    """An environment with vLLM, and the plugin as it is installed."""

    python: Path
    plugin: Path

    @property
    def variables(self) -> dict[str, str]:
        told = {"PYTHONPATH": str(self.plugin), "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        return os.environ | told | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}

    def run(self, *arguments: str | Path, **told: Any) -> subprocess.CompletedProcess[str]:
        command = [str(self.python), *map(str, arguments)]
        return subprocess.run(
            command, env=self.variables, capture_output=True, text=True, check=False, timeout=900, cwd="/", **told
        )


@dataclass(frozen=True)
class Served:
    """An export, prompts, and what ours makes of them."""

    folder: Path
    run: SavedRun
    prompts: list[list[int]]
    tokens: list[list[int]]


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Vllm:
    python = Path(os.environ.get("ENGRAM_VLLM_PYTHON", ROOT / ".venv-vllm/bin/python"))
    if not python.exists():
        pytest.skip("needs vLLM: `make vllm`, or ENGRAM_VLLM_PYTHON=/path/to/python")
    source, plugin = tmp_path_factory.mktemp("source") / "serve", tmp_path_factory.mktemp("plugin")
    shutil.copytree(ROOT / "serve", source, ignore=shutil.ignore_patterns("*.egg-info", "build"))
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--target", str(plugin)]
    subprocess.run([python, "-m", "pip", "install", *options, str(source)], check=True)
    return Vllm(python, plugin)


def make(kind: str, corpus: Path, folder: Path) -> Served:
    sections = {"train": {"steps": 80}, "optimizer": {"learning_rate": 0.01}, "offload": {"window_rows": 4000}}
    job = write_job(folder, corpus, model=KINDS[kind], checkpoint={"every": 80}, **sections)
    train(job, "--nproc", "1", f"data.sequence_length={LENGTH}")
    run = SavedRun.open(folder / "runs" / "small")
    exported = engram("export", folder / "runs" / "small", "--to", folder / "hf", "--shard-size", "20KB")
    assert exported.returncode == 0, exported.stderr
    text, draw = run.tokenizer.encode(Path(bisect.__file__).read_text()), random.Random(1)
    starts = [draw.randrange(len(text) - 120) for _ in range(PROMPTS)]
    prompts = [text[start : start + draw.randint(1, 120)] for start in starts]
    return Served(folder / "hf", run, prompts, continued(run, prompts))


def continued(run: SavedRun, prompts: list[list[int]]) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in prompts]
    with TextBatch(run.model(), run.tables(), run.tokenizer.pad_id) as texts:
        new = prompts
        for _ in range(TOKENS):
            new = texts.append(new).argmax(dim=1, keepdim=True).tolist()
            found = [[*tokens, *next_one] for tokens, next_one in zip(found, new, strict=True)]
    return found


@pytest.fixture(scope="module")
def served(vllm: Vllm, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Served:
    return make("engram", corpus, tmp_path_factory.mktemp("engram"))


@pytest.mark.parametrize("kind", ["engram", "branched"])
def test_greedy_tokens_are_ours_in_all_batches(
    kind: str, vllm: Vllm, served: Served, corpus: Path, tmp_path: Path
) -> None:
    """Many requests at once, then again from the prefix cache; in chunks and few at a time; with guessed tokens."""
    guesses = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    served = served if kind == "engram" else make(kind, corpus, tmp_path)
    rounds = [
        {"options": {}, "times": 2},
        {"options": {"max_num_batched_tokens": 24, "max_num_seqs": 5}, "times": 1},
        {"options": {"speculative_config": guesses}, "times": 1},
    ]
    job = {"folder": str(served.folder), "prompts": served.prompts, "tokens": TOKENS, "rounds": rounds}
    result = vllm.run(ROOT / "tests/serve/served.py", tmp_path / "found.json", input=json.dumps(job))
    assert result.returncode == 0, result.stderr[-4000:]
    (first, again), (chunks,), (guessed,) = json.loads((tmp_path / "found.json").read_text())
    assert again["cached"] > first["cached"] + 1000
    for found in (first, again, chunks, guessed):
        assert found["tokens"] == served.tokens


@torch.no_grad()
def scores(run: SavedRun, prompt: list[int], *, memory: bool = True) -> Tensor:
    """Log-probability of each of a prompt's tokens but the first, by training's forward in fp32."""
    tables = run.tables()
    assert tables is not None
    tokens_BT, positions_BT = torch.tensor([prompt[:-1]]), torch.arange(len(prompt) - 1)[None]
    rows = tables.look_up(tokens_BT, positions_BT)
    if not memory:
        rows = [table._replace(rows_UD=torch.zeros_like(table.rows_UD)) for table in rows]
    logits = run.model()(tokens_BT, positions_BT, rows)[0]
    return logits.log_softmax(-1).gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]


@pytest.mark.parametrize("kind", ["engram", "branched"])
def test_in_bf16_prompts_are_as_likely_as_ours_but_for_rounding(
    kind: str, vllm: Vllm, served: Served, corpus: Path, tmp_path: Path
) -> None:
    served = served if kind == "engram" else make(kind, corpus, tmp_path)
    prompts = [prompt for prompt in served.prompts if len(prompt) > 1]
    rounds = [{"options": {"dtype": "bfloat16"}, "times": 1, "scored": True}]
    job = {"folder": str(served.folder), "prompts": prompts, "tokens": 1, "rounds": rounds}
    result = vllm.run(ROOT / "tests/serve/served.py", tmp_path / "found.json", input=json.dumps(job))
    assert result.returncode == 0, result.stderr[-4000:]
    ((found,),) = json.loads((tmp_path / "found.json").read_text())
    theirs = torch.tensor([score for each in found["scores"] for score in each])
    ours, without = (torch.cat([scores(served.run, each, memory=on) for each in prompts]) for on in (True, False))
    assert (theirs - ours).abs().mean() < 0.02
    assert (theirs - ours).abs().quantile(0.99) < 0.1
    assert (theirs - without).abs().mean() > 0.1, "it would not be seen if rows were wrong"


def post(port: int, route: str, body: dict[str, Any]) -> Any:
    told = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{route}", json.dumps(body).encode(), told)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def wait_for(port: int, server: subprocess.Popen[str]) -> None:
    for _ in range(600):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            return
        except (urllib.error.URLError, ConnectionError):
            assert server.poll() is None, "the server ended"
            time.sleep(0.5)
    raise TimeoutError("the server does not answer")


@pytest.fixture(scope="module")
def port(vllm: Vllm, served: Served) -> Iterator[int]:
    """A server of the export."""
    port = free_port()
    options = ["--dtype", "float32", "--host", "127.0.0.1", "--port", str(port), "--served-model-name", "tiny"]
    command = [str(vllm.python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(served.folder), *options]
    with subprocess.Popen(command, env=vllm.variables, text=True, cwd="/") as server:
        try:
            wait_for(port, server)
            yield port
        finally:
            server.terminate()


CLIENT = """
import openai, sys
client = openai.OpenAI(base_url=sys.argv[1], api_key="none")
options = {"temperature": 0, "max_tokens": 24, "extra_body": {"ignore_eos": True}}
print(client.completions.create(model="tiny", prompt=sys.argv[2], **options).choices[0].text, end="")
"""


def test_the_endpoint_answers_many_clients_at_once(vllm: Vllm, served: Served, port: int) -> None:
    def ask(prompt: list[int]) -> Any:
        told = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, "return_token_ids": True}
        return post(port, "/v1/completions", {"model": "tiny", "prompt": prompt, **told})["choices"][0]["token_ids"]

    with ThreadPoolExecutor(8) as clients:
        assert [*clients.map(ask, served.prompts[:16])] == served.tokens[:16]


def test_the_openai_package_gets_the_text(vllm: Vllm, served: Served, port: int) -> None:
    text = "import sys\n\ndef main("
    (tokens,) = continued(served.run, [served.run.tokenizer.encode(text)])
    result = vllm.run("-c", CLIENT, f"http://127.0.0.1:{port}/v1", text)
    assert result.returncode == 0, result.stderr
    assert result.stdout == served.run.tokenizer.decode(tokens)


def test_a_setting_that_would_be_wrong_is_refused_in_one_line(vllm: Vllm, served: Served) -> None:
    code = f"from vllm import LLM; LLM({str(served.folder)!r}, dtype='float32', enable_prompt_embeds=True)"
    result = vllm.run("-c", code)
    assert result.returncode != 0
    assert "vllm-engram: --enable-prompt-embeds: n-grams are made of token ids" in result.stderr
