import copy

import pytest
from pydantic import ValidationError

from train.config.deepspeed import DeepSpeedConfig, ExpertParallelConfig, ZeroConfig
from train.config.deepspeed_keys import OWNED_KEYS, UNSUPPORTED_EXPERT_KEYS, UNSUPPORTED_KEYS, UNSUPPORTED_ZERO_KEYS
from train.config.job import JobConfig


@pytest.mark.parametrize(
    ("key", "ours"),
    [
        ("bf16", "train.dtype"),
        ("gradient_accumulation_steps", "train.global_batch_size and train.micro_batch_size"),
        ("optimizer", "optimizer"),
    ],
)
def test_a_key_that_we_own_names_ours(key, ours):
    with pytest.raises(ValidationError, match=f"{key} is not set here: {ours} decides it"):
        DeepSpeedConfig.model_validate({key: 1})


def test_what_decides_in_place_of_deepspeed_is_a_key_of_ours():
    for path in {path for ours in OWNED_KEYS.values() for path in ours.split(" and ")}:
        section, _, key = path.partition(".")
        field = JobConfig.model_fields[section]
        assert not key or key in field.annotation.model_fields, path


@pytest.mark.parametrize(
    "section",
    [
        {"elasticity": {}},
        {"zero_optimization": {"offload_param": {"device": "cpu"}}},
        {"expert_parallel": {"load_balance_coeff": 1e-3}},
    ],
)
def test_an_unsupported_key_is_refused_by_its_path(section):
    with pytest.raises(ValidationError, match="that is not supported") as caught:
        DeepSpeedConfig.model_validate(section)
    (key, value), *_ = section.items()
    assert (f"{key}.{next(iter(value))}" if value else key) in str(caught.value)


@pytest.mark.parametrize(
    "section",
    [{"gradient_cliping": 1.0}, {"zero_optimization": {"stge": 2}}, {"expert_parallel": {"autoep_sise": 2}}],
)
def test_a_key_that_deepspeed_would_ignore_is_refused(section):
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        DeepSpeedConfig.model_validate(section)


@pytest.mark.parametrize(
    "section",
    [
        {"zero_optimization": {"stage": 4}},
        {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
        {"expert_parallel": {"autoep_size": 2}},
    ],
)
def test_impossible_values_are_refused(section):
    with pytest.raises(ValidationError):
        DeepSpeedConfig.model_validate(section)


def test_the_section_survives_being_saved():
    config = DeepSpeedConfig.model_validate({"zero_optimization": {"stage": 2}, "communication_data_type": "bf16"})
    assert DeepSpeedConfig.model_validate(config.model_dump()) == config


@pytest.mark.parametrize(
    ("world_size", "num_experts", "message"),
    [(2, None, "no experts"), (2, 6, "does not divide model.moe.num_experts, 6"), (6, 8, "the number of ranks, 6")],
)
def test_experts_that_cannot_be_spread_are_one_line(world_size, num_experts, message):
    config = DeepSpeedConfig.model_validate({"expert_parallel": {"enabled": True, "autoep_size": 4}})
    with pytest.raises(ValueError, match=message) as caught:
        config.check(world_size, num_experts)
    assert "\n" not in str(caught.value)


def test_experts_that_can_be_spread_pass():
    DeepSpeedConfig.model_validate({"expert_parallel": {"enabled": True, "autoep_size": 4}}).check(8, 12)
    DeepSpeedConfig().check(3, None)


def test_what_we_rely_on_is_written_out():
    config = DeepSpeedConfig.model_validate({"zero_optimization": {"stage": 3}}).build("bf16", 4, 2, 1000)
    assert config["gradient_clipping"] == 0.0
    assert config["bf16"] == {"enabled": True, "check_grad_overflow": False, "immediate_grad_update": False}
    assert config["data_types"]["grad_accum_dtype"] == "fp32"
    assert config["zero_optimization"]["overlap_comm"] is True
    assert config["train_batch_size"] == 8
    assert DeepSpeedConfig().build("fp32", 1, 1, 1000)["zero_optimization"]["overlap_comm"] is False


@pytest.mark.parametrize(("elements", "size"), [(1000, 1000), (10**9, 50_000_000)])
def test_a_bucket_is_no_larger_than_all_gradients(elements, size):
    assert DeepSpeedConfig().build("fp32", 1, 1, elements)["zero_optimization"]["reduce_bucket_size"] == size


class Spy(dict):
    """A config that notes which of its top-level keys are asked for."""

    def __init__(self, values, asked):
        super().__init__(values)
        self.asked = asked

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)

    def keys(self):
        return self

    def __copy__(self):
        return Spy(self, self.asked)


@pytest.fixture(scope="module")
def deepspeed():
    import train.engine.setup  # noqa: F401

    return pytest.importorskip("deepspeed")


def test_contract_the_version_is_the_one_this_was_written_for(deepspeed):
    assert deepspeed.__version__ == "0.19.8"


def test_contract_every_top_level_key_that_deepspeed_reads_is_known(deepspeed):
    from deepspeed.runtime.config import DeepSpeedConfig as Theirs

    asked = set()
    Theirs(Spy({"train_micro_batch_size_per_gpu": 1}, asked))
    assert asked == DeepSpeedConfig.model_fields.keys() | OWNED_KEYS.keys() | UNSUPPORTED_KEYS


def test_contract_zero_keys_and_defaults(deepspeed):
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig as Theirs

    theirs = {field.alias or name: field.default for name, field in Theirs.model_fields.items()}
    assert theirs.keys() == ZeroConfig.model_fields.keys() | UNSUPPORTED_ZERO_KEYS
    differing = {name for name, field in ZeroConfig.model_fields.items() if field.default != theirs[name]}
    assert differing == {"stage", "reduce_bucket_size", "memory_efficient_linear", "offload_optimizer"}


def test_contract_expert_keys_and_defaults(deepspeed):
    from deepspeed.module_inject.auto_ep_config import parse_autoep_config

    asked = set()
    parsed = parse_autoep_config(Spy({"enabled": False}, asked))
    assert asked == ExpertParallelConfig.model_fields.keys() | UNSUPPORTED_EXPERT_KEYS
    fields = ExpertParallelConfig.model_fields.items()
    assert {name for name, field in fields if field.default != getattr(parsed, name)} == {"preset_model"}


def test_contract_deepspeed_takes_the_whole_config(deepspeed):
    from deepspeed.runtime.config import DeepSpeedConfig as Theirs

    section = {"expert_parallel": {"enabled": True}, "zero_optimization": {"stage": 2}}
    built = DeepSpeedConfig.model_validate(section).build("bf16", 2, 1, 1000)
    parsed = Theirs(copy.deepcopy(built))
    assert parsed.gradient_clipping == 0.0
    assert parsed.zero_optimization_stage == 2
    assert parsed.expert_parallel_config.enabled
