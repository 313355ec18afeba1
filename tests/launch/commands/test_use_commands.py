"""`engram export`, `generate` and `eval` on a run that was trained by the command itself."""

import json
import sys
from pathlib import Path

import pytest

from launch.commands.eval import fingerprints
from tests.command_line import assert_refused, invoke, losses


def answer(*arguments: str | Path) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_export(trained: Path, tmp_path: Path) -> None:
    found = json.loads(answer("export", trained, "--to", tmp_path / "out", "--shard-size", "0.02MB", "--json"))
    files = list((tmp_path / "out").rglob("*.safetensors"))
    assert found["files"] == len(files) > 2
    assert found["bytes"] <= sum(path.stat().st_size for path in files)
    text = answer("export", trained, "--to", tmp_path / "other", "--step", 3)
    assert text.startswith("step 3: ")
    assert text.endswith("as engram (deepseek_v3 has no model.engram)\n")


def test_generate(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained.parents[1])
    options = ("generate", "small", "def main(", "--tokens", 5, "--top-k", 20, "--seed", 3)
    text = answer(*options)
    assert text.startswith("def main(")
    found = json.loads(answer(*options, "--json"))
    assert found["text"] + "\n" == text
    assert 0 < found["new_tokens"] <= 5


def test_eval(trained: Path) -> None:
    sequences = ("--sequences", 8)
    found = json.loads(answer("eval", trained, *sequences, "--json"))
    assert found["loss"] == pytest.approx(losses(trained)[-1][1], rel=1e-6)
    assert f"step 6: {found['loss']:.4f} nats/token" in answer("eval", trained, *sequences)
    data = json.loads((trained / "summary.json").read_text())
    assert found["bits_per_byte"] == pytest.approx(data["val_bits_per_byte"], rel=1e-6)


def test_the_stores_of_a_run_are_those_of_all_its_phases() -> None:
    mixed = {"mix": [["a", 3], ["b", 1]], "seed": 0, "phases": [{"after_steps": 5, "fingerprint": "c"}]}
    assert fingerprints(mixed) == {"a", "b", "c"}
    assert fingerprints({"fingerprint": "a", "split": "train"}) == {"a"}


def test_the_runs_own_text_is_known_by_what_it_is(trained: Path, corpus: Path) -> None:
    options = ("--sequences", 2, "--json")
    own, named, everything = (
        json.loads(answer("eval", trained, *more, *options))["loss"]
        for more in ((), ("--data", corpus), ("--data", corpus, "--split", "all"))
    )
    assert own == named != everything


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("export", "RUN", "--to", "RUN"), "is not empty"),
        (("export", "RUN"), "Missing option '--to'"),
        (("export", "RUN", "--to", "new", "--shard-size", "5 apples"), "'5 apples' is no size; give one such as 5GB"),
        (("export", "RUN", "--to", "new", "--step", "5"), "no checkpoint of step 5; there are: 3, 6"),
        (("generate", "nowhere", "x"), "nowhere: not a run"),
        (("generate", "RUN", "x", "--temperature", "-1"), "Invalid value for '--temperature'"),
        (("generate", "RUN", "x", "--temperature", "nan"), "nan is no finite number."),
        (("generate", "RUN", "x", "--seed", str(2**70)), "is not in the range 0<=x<=9223372036854775807"),
        (("generate", "RUN", "\udcff"), "character 1 is no Unicode"),
        (("eval", "RUN", "--tasks", "x,,y"), "--tasks has an empty name."),
        (("eval", "RUN", "--data", "~/x"), "~ is not your home here"),
        (("eval", "RUN", "--data", "nowhere"), "nowhere: no prepared folder"),
        (("eval", "RUN", "--limit", "3"), "--limit has no meaning without --tasks."),
        (("eval", "RUN", "--tasks", "x", "--split", "all"), "--split has no meaning with --tasks."),
    ],
)
def test_mistakes_are_told_in_one_line(arguments: tuple[str, ...], message: str, trained: Path) -> None:
    assert_refused(invoke(*(str(trained) if word == "RUN" else word for word in arguments)), message)


def test_without_the_harness_its_extra_is_named(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "train.use.harness", raising=False)
    refused = invoke("eval", trained, "--tasks", "arc_easy")
    assert_refused(refused, "pip install 'engram-pretrain[harness]'")
