"""Answers to lm-evaluation-harness, request by request, beside those of its own HFLM over the same network.

A model without memory and branches is a DeepSeek-V3, which transformers implements.
"""

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.command_line import JOB, train, write_job
from train.use.saved_run import SavedRun

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


@pytest.fixture(scope="module")
def both(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Both:
    pytest.importorskip("lm_eval")
    transformers = pytest.importorskip("transformers")
    from lm_eval.models.huggingface import HFLM

    from train.use.harness import HarnessModel

    folder = tmp_path_factory.mktemp("plain")
    model = {"engram": None, "moe": JOB["model"]["moe"] | {"shared_experts": 1, "routed_scaling_factor": 1.5}}
    sections = {"train": {"steps": 6}, "optimizer": {"learning_rate": 0.01}}
    train(write_job(folder, corpus, model=model, **sections), "--nproc", "1")
    run = folder / "runs" / "small"
    saved = SavedRun.open(run)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(run)
    theirs = HFLM(_deepseek_v3(saved), tokenizer=tokenizer, batch_size=3, max_length=LENGTH, device="cpu")
    return Both(HarnessModel(saved, batch_tokens=3 * LENGTH), theirs)


def _deepseek_v3(saved: SavedRun) -> Any:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    ours = saved.job.model
    assert ours.moe is not None
    config = DeepseekV3Config(
        vocab_size=ours.vocab_size,
        hidden_size=ours.hidden_size,
        intermediate_size=ours.dense_hidden_size,
        moe_intermediate_size=ours.moe.expert_hidden_size,
        num_hidden_layers=ours.num_layers,
        num_attention_heads=ours.attention.heads,
        num_key_value_heads=ours.attention.heads,
        n_shared_experts=ours.moe.shared_experts,
        n_routed_experts=ours.moe.num_experts,
        routed_scaling_factor=ours.moe.routed_scaling_factor,
        num_experts_per_tok=ours.moe.experts_per_token,
        norm_topk_prob=ours.moe.norm_topk,
        first_k_dense_replace=ours.dense_layers,
        kv_lora_rank=ours.attention.kv_lora_rank,
        q_lora_rank=ours.attention.q_lora_rank,
        qk_nope_head_dim=ours.attention.qk_nope_dim,
        qk_rope_head_dim=ours.attention.qk_rope_dim,
        v_head_dim=ours.attention.v_dim,
        n_group=1,
        topk_group=1,
        max_position_embeddings=LENGTH,
        rms_norm_eps=1e-6,
        rope_theta=ours.attention.rope_theta,
        rope_interleave=True,
        tie_word_embeddings=ours.tie_embeddings,
        bos_token_id=None,
        eos_token_id=saved.tokenizer.eos_id,
        pad_token_id=saved.tokenizer.pad_id,
    )
    model = DeepseekV3ForCausalLM(config).eval()
    model.load_state_dict(saved.model().state_dict())
    return model


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
        {"until": "", "max_new_tokens": 9},
        {"until": [""], "max_tokens": 5, "temperature": 0.0},
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
