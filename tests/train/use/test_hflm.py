"""Answers to lm-evaluation-harness, request by request, beside those of its own HFLM over an export of the run."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.train.huggingface.exports import make_export, make_run, own_code_cache

LENGTH = 32
LONG = "def main(argv):\n    return argv\n" * 3  # longer than the model


class Both(NamedTuple):
    ours: Any
    theirs: Any

    def answers(self, kind: str, requests: list[tuple[Any, ...]]) -> tuple[list[Any], list[Any]]:
        from lm_eval.api.instance import Instance

        def asked() -> list[Any]:
            kinds = {"metadata": ("task", 0, 1)}
            return [Instance(kind, {}, arguments, number, **kinds) for number, arguments in enumerate(requests)]

        return tuple(getattr(model, kind)(asked(), disable_tqdm=True) for model in self)  # type: ignore[return-value]


@pytest.fixture(scope="module", params=["plain", "engram"])
def both(request: pytest.FixtureRequest, trained: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Both:
    pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    from train.use.harness import HarnessModel

    folder = tmp_path_factory.mktemp(request.param)
    run = trained if request.param == "engram" else make_run("plain", corpus, folder)
    exported = make_export(run, folder / f"{request.param}-hf")
    # Its cache takes windows of one input but of different lengths for equally long ones.
    settings = {"batch_size": 3, "max_length": LENGTH, "device": "cpu", "logits_cache": False}
    with own_code_cache():
        theirs = HFLM(str(exported.folder), trust_remote_code=True, **settings)
    return Both(HarnessModel(exported.saved, batch_tokens=3 * LENGTH), theirs)


CHOICES = [
    ("import ", "os"),
    ("import ", "zq~ zq~"),
    ("import", " o"),
    ("import", " s"),
    ("", "def f(self):"),
    ("for x in  ", "range(10)"),
    (LONG, " argv"),
    (LONG, "return argv"),
    ("x", "y" * 30),
]


def test_log_probabilities_of_choices(both: Both) -> None:
    ours, theirs = both.answers("loglikelihood", CHOICES)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert [found for found, _ in ours] == pytest.approx([found for found, _ in theirs], rel=1e-6)
    assert len({round(found, 3) for found, _ in ours}) == len(CHOICES)


def test_log_probabilities_of_whole_texts(both: Both) -> None:
    ours, theirs = both.answers("loglikelihood_rolling", [(LONG,), ("import os\n",), (LONG * 2,), ("",)])
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert ours[3] == 0 > ours[1] > ours[0] > ours[2]


@pytest.mark.parametrize(
    "options",
    [
        {"max_gen_toks": 8},
        {"until": ["\n", "e"], "max_gen_toks": 12},
        {"until": "\n", "max_new_tokens": 9},
        {"max_tokens": 5, "temperature": 0.0},
        {"max_gen_toks": 8, "do_sample": False, "temperature": 0.7, "num_beams": 1},
        {"max_gen_toks": 8, "do_sample": True, "temperature": 0.5, "top_k": 1},
        {"max_gen_toks": 8, "temperature": 1.0, "top_p": 1e-6},
    ],
    ids=str,
)
def test_what_is_written(both: Both, options: dict[str, Any]) -> None:
    prompts = ["import ", LONG, "def f(", "class A:\n    def __init__(self"]
    ours, theirs = both.answers("generate_until", [(prompt, options) for prompt in prompts])
    assert ours == theirs
    assert len({*ours}) > 1
