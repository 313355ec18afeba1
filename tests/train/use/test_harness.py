"""The model as lm-evaluation-harness sees it, on tasks made here: nothing is downloaded."""

import functools
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from torch import Tensor

from launch.cli import main
from tests.command_line import engram
from tests.train.huggingface.exports import make_export
from tests.train.use.test_generation import continued
from train.data.tokenization.tokenizer import Tokenizer
from train.errors import UserError
from train.use.saved_run import SavedRun

QUESTIONS = [
    {"question": "import ", "choices": ["os", "zq~ zq~"], "answer": 0},
    {"question": "def f(self", "choices": ["}}}}}}", "):"], "answer": 1},
    {"question": "for x in ", "choices": ["range(10)", "range(100000):"], "answer": 1},
]
LONG = "def main(argv):\n    return argv\n" * 3  # longer than the run's sequences


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    questions = folder / "questions.jsonl"
    questions.write_text("\n".join(map(json.dumps, [*QUESTIONS[:2], QUESTIONS[2] | {"question": LONG}])))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(questions)}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
    }
    choice = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "metric_list": [{"metric": "acc"}]}
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}}"}
    rolling["metric_list"] = [{"metric": "bits_per_byte"}]
    written = {
        "output_type": "generate_until",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match"}],
    }
    for name, task in (("choice", choice), ("rolling", rolling), ("written", written)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": f"local_{name}", **common, **task}))
    return folder


@torch.no_grad()
def log_probabilities(saved: SavedRun, ids: list[int]) -> Tensor:
    """Of each token but the first, by training's forward."""
    tokens_BT, positions_BT = torch.tensor([ids[:-1]]), torch.arange(len(ids) - 1)[None]
    logits = saved.model()(tokens_BT, positions_BT, saved.tables().look_up(tokens_BT, positions_BT))[0]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def choice_scores(saved: SavedRun, question: str, choices: list[str]) -> list[float]:
    encode, longest = saved.tokenizer.encode, saved.job.data.sequence_length + 1
    scores = []
    for choice in choices:
        # A space between question and choice, and those at the question's end belong to the choice.
        whole, context = encode(f"{question} {choice}"), encode(question.rstrip(" "))
        scores.append(float(log_probabilities(saved, whole[-longest:])[len(context) - len(whole) :].sum()))
    return scores


def rolling_score(saved: SavedRun, text: str) -> float:
    """Windows of the run's length that each predict new tokens alone, the last with as much context as it has room."""
    ids, length = [saved.tokenizer.eos_id, *saved.tokenizer.encode(text)], saved.job.data.sequence_length
    total = 0.0
    for start in range(0, len(ids) - 1, length):
        end = min(start + length, len(ids) - 1)
        total += float(log_probabilities(saved, ids[max(0, end - length) : end + 1])[-(end - start) :].sum())
    return total


def test_tasks_are_scored_with_the_models_own_probabilities(tasks: Path, trained: Path) -> None:
    saved = SavedRun.open(trained)
    names = "local_choice,local_rolling,local_written"
    result = CliRunner().invoke(
        main, ["eval", str(trained), "--tasks", names, "--include", str(tasks), "--json"], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout[result.stdout.index("{") :])
    texts = [question["question"] for question in QUESTIONS[:2]] + [LONG]
    right = 0
    for text, question in zip(texts, QUESTIONS, strict=True):
        scores = choice_scores(saved, text, question["choices"])
        right += scores.index(max(scores)) == question["answer"]
    assert found["tasks"]["local_choice"]["acc,none"] == pytest.approx(right / 3)
    assert found["tasks"]["local_choice"]["acc_stderr,none"] == pytest.approx((right * (3 - right) / 18) ** 0.5)
    nats = -sum(rolling_score(saved, text) for text in texts)
    text_bytes = sum(len(text.encode()) for text in texts)
    assert found["tasks"]["local_rolling"]["bits_per_byte,none"] == pytest.approx(
        nats / text_bytes / math.log(2), rel=1e-5
    )
    assert found["tasks"]["local_written"]["exact_match,none"] == 0


def test_what_the_model_writes(tasks: Path, trained: Path) -> None:
    from lm_eval.api.instance import Instance

    from train.use.harness import HarnessModel

    saved = SavedRun.open(trained)
    tokenizer: Tokenizer = saved.tokenizer
    prompt = tokenizer.encode("import ")
    greedy = tokenizer.decode(continued(saved, prompt, num_tokens=8, temperature=0, top_k=None, seed=0))
    assert len(greedy) > 2
    model = HarnessModel(saved)

    def written(**options: object) -> str:
        arguments = ("import ", {"max_gen_toks": 8, **options})
        return model.generate_until([Instance("generate_until", {}, arguments, 0)])[0]

    assert written() == greedy
    stop = greedy[2]
    assert written(until=[stop, "never there"]) == greedy[: greedy.index(stop)]
    assert written(until="") == written(until=["", "never there"]) == greedy
    assert model.loglikelihood([Instance("loglikelihood", {}, ("import ", greedy), 0)])[0][1] in (True, False)


def written(model: Any, requests: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """What the model answers to requests that the harness repeats three times each."""
    from lm_eval.api.instance import Instance

    asked = [Instance("generate_until", {}, each, number, ("task", 7, 3)) for number, each in enumerate(requests)]
    return model.generate_until([each for each in asked for _ in range(each.repeats)], disable_tqdm=True)


def test_repeats_of_a_sampled_request_differ_and_depend_on_the_request_alone(tasks: Path, trained: Path) -> None:
    from train.use.harness import HarnessModel

    saved = SavedRun.open(trained)
    sampled = {"temperature": 1.0, "max_gen_toks": 8}
    first, other = ("import ", sampled), ("import ", {**sampled, "top_p": 0.9})
    alone, both = written(HarnessModel(saved), [first]), written(HarnessModel(saved), [first, other])
    assert both[:3] == alone
    assert len({*both}) == 6
    assert written(HarnessModel(saved, seed=1), [first]) != alone
    assert len({*written(HarnessModel(saved), [("import ", {"max_gen_toks": 8})])}) == 1


@pytest.mark.parametrize(
    ("kind", "arguments", "told"),
    [
        ("generate_until", ("x", {"num_beams": 4}), "generation option num_beams=4 is not supported"),
        (
            "generate_until",
            ("x", {"max_gen_toks": 32}),
            "asks for 32 new tokens, but prompt and answer share the model",
        ),
        ("generate_until", ("x", {"max_gen_toks": "many"}), "generation options {'max_gen_toks': 'many'}: "),
        ("loglikelihood", ("x", LONG), "tokens, and the model's sequences 32 "),
        ("loglikelihood", ("x", ""), "a text to score has no token"),
    ],
)
def test_what_the_model_cannot_do_is_told_in_one_line(
    kind: str, arguments: tuple[Any, ...], told: str, tasks: Path, trained: Path
) -> None:
    from lm_eval.api.instance import Instance

    from train.use.harness import HarnessModel

    with pytest.raises(UserError, match=re.escape(told)) as refused:
        getattr(HarnessModel(SavedRun.open(trained)), kind)([Instance(kind, {}, arguments, 0, ("task", 0, 1))])
    assert "\n" not in str(refused.value)


@pytest.mark.long
def test_two_ranks_find_what_one_finds(tasks: Path, trained: Path) -> None:
    names = "local_choice,local_rolling,local_written"
    one, two = (
        engram("eval", trained, "--tasks", names, "--include", tasks, "--json", "--nproc", nproc) for nproc in "12"
    )
    assert (one.returncode, two.returncode) == (0, 0), one.stderr + two.stderr
    figures = [json.loads(result.stdout)["tasks"] for result in (one, two)]
    for task, found in figures[0].items():
        assert figures[1][task] == pytest.approx(found, rel=1e-6)
    refused = engram("eval", trained, "--tasks", names, "--include", tasks, "--limit", "1", "--nproc", "2")
    assert refused.returncode == 2
    assert "--limit 1 leaves some of 2 ranks without a question" in refused.stderr


@pytest.mark.long
def test_the_harness_itself_finds_the_same_by_an_export(tasks: Path, trained: Path, tmp_path: Path) -> None:
    """`lm_eval --model hf`, as docs/serve.md has it: a command of its own, which knows nothing of this project."""
    names = "local_choice,local_rolling,local_written"
    model = make_export(trained, tmp_path / "tiny-hf").folder
    told = subprocess.run(
        [
            *(sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu", "--tasks", names),
            *("--model_args", f"pretrained={model},trust_remote_code=True", "--include_path", str(tasks)),
            *("--output_path", str(tmp_path / "found.json")),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"},
    )
    assert told.returncode == 0, told.stderr
    (written,) = tmp_path.glob("found*.json")
    theirs = json.loads(written.read_text())["results"]
    ours = json.loads(engram("eval", trained, "--tasks", names, "--include", tasks, "--json").stdout)["tasks"]
    compared = 0
    for task, found in ours.items():
        for name, value in found.items():
            if isinstance(value, float):
                assert theirs[task][name] == pytest.approx(value, rel=1e-5), (task, name)
                compared += 1
    assert compared >= 4


def test_unknown_tasks_and_folders_are_told_in_one_line(
    tasks: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import train.use.harness

    own_only = functools.partial(train.use.harness.TaskManager, include_defaults=False)  # the others take ten seconds
    monkeypatch.setattr(train.use.harness, "TaskManager", lambda include_path, **_: own_only(include_path=include_path))
    for options, message in (
        (["--tasks", "local_none", "--include", str(tasks)], "local_none: lm-evaluation-harness has no such task"),
        (["--tasks", "local_choice", "--include", "nowhere"], "nowhere: no such folder of task files"),
    ):
        result = CliRunner().invoke(main, ["eval", str(trained), *options])
        assert result.exit_code == 2
        assert message in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
