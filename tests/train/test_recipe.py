"""The whole recipe, trained for real on two ranks, loses what a plain trainer of one process loses, step by step."""

import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from model.config import AttentionConfig, EngramConfig, HyperConnectionsConfig, ModelConfig, MoEConfig
from model.transformer import LanguageModel
from offload.addresses.compression import identity_vocabulary
from offload.addresses.hashing import AddressBook
from tests.distributed import run_ranks
from tests.train.plain_trainer import GlobalBatch, PlainTrainer, Step, muon_names
from train.config.job import JobConfig
from train.data.batches.loader import Batch

RANKS, SEQUENCES, LENGTH, VOCABULARY = 2, 8, 16, 24
EARLY = 12
STEPS = [14, pytest.param(50, marks=pytest.mark.long)]
"""Of a run: warm-up, peak and both milestones come in each."""


class Setting(NamedTuple):
    """A way to spread the job."""

    stage: int
    expert_parallel: int | None
    """Ranks that share one set of experts; None without AutoEP."""
    accumulation: int


# Every pair of a ZeRO stage, a size of expert parallelism and a number of accumulated micro-batches; for the size 1,
# once through DeepSpeed's layer and twice through our own.
SETTINGS = [
    Setting(1, None, 1),
    Setting(1, 2, 2),
    Setting(2, 1, 2),
    Setting(2, 2, 1),
    Setting(3, None, 1),
    Setting(3, 2, 2),
]
CHEAP = {Setting(1, 2, 2), Setting(2, 1, 2), Setting(3, None, 1)}
"""Each value once."""
MODEL = ModelConfig(
    vocab_size=VOCABULARY,
    hidden_size=16,
    num_layers=2,
    dense_hidden_size=32,
    attention=AttentionConfig(heads=2, kv_lora_rank=8, qk_nope_dim=8, qk_rope_dim=4, v_dim=8),
    moe=MoEConfig(num_experts=4, expert_hidden_size=16, sequence_balance_factor=0.05, balance_rate=1e-3),
    engram=EngramConfig(layers=[0, 1], heads=2, rows_per_head=300, row_dim=4),
    hyper_connections=HyperConnectionsConfig(expansion=2, sinkhorn_iterations=4),
)


def job_of(setting: Setting, steps: int) -> JobConfig:
    experts = setting.expert_parallel
    return JobConfig.model_validate(
        {
            "run": {"name": "recipe"},
            "model": MODEL,
            "data": {"sequence_length": LENGTH},
            "train": {
                "steps": steps,
                "global_batch_size": SEQUENCES,
                "micro_batch_size": SEQUENCES // RANKS // setting.accumulation,
                "gradient_clipping": 0.5,
            },
            "optimizer": {"learning_rate": 2e-3, "muon_learning_rate": 1e-3, "eps": 1e-6},
            "schedule": {"shape": "step_decay", "warmup_steps": 5},
            "offload": {"depth": 2, "window_rows": 450, "optimizer": {"lr_factor": 5.0, "eps": 1e-6}},
            "eval": {"every": steps, "sequences": SEQUENCES},
            "checkpoint": {"every": steps},
            "deepspeed": {
                # Small, so that gradients take several buckets and most parameters are partitioned.
                "zero_optimization": {
                    "stage": setting.stage,
                    "reduce_bucket_size": 4000,
                    "stage3_param_persistence_threshold": 300,
                    "sub_group_size": 6000,
                },
                "expert_parallel": {"enabled": experts is not None, "autoep_size": experts or 1},
            },
        }
    )


def addresses() -> AddressBook:
    assert MODEL.engram is not None
    engram = MODEL.engram
    return AddressBook(
        identity_vocabulary(VOCABULARY, pad_id=0),
        layers=engram.layers,
        orders=engram.orders,
        heads=engram.heads,
        rows_per_head=engram.rows_per_head,
        seed=engram.seed,
    )


def global_batch(step: int) -> GlobalBatch:
    """Text that can be learnt in part; documents of all lengths; sequences with many labels and with few."""
    generator = torch.Generator().manual_seed(step)
    shape = (SEQUENCES, LENGTH)
    tokens = torch.randint(VOCABULARY, shape, generator=generator)
    for t in range(1, LENGTH):
        tokens[:, t] = (5 * tokens[:, t - 1] + torch.randint(3, (SEQUENCES,), generator=generator)) % VOCABULARY
    starts = torch.rand(shape, generator=generator) < 0.1
    starts[:, 0] = True
    place = torch.arange(LENGTH).expand(shape)
    positions = place - torch.where(starts, place, 0).cummax(dim=1).values
    labels = tokens.roll(-1, 1).masked_fill(starts.roll(-1, 1), -100)
    padded = torch.randint(2 * LENGTH, (SEQUENCES, 1), generator=generator)
    return GlobalBatch(tokens, labels.masked_fill(place >= padded.clamp_min(1), -100), positions)


class Source:
    """This rank's part of the batches, as a loader gives it."""

    global_batch_size, steps_per_epoch, sources = SEQUENCES, 1, (SimpleNamespace(name=""),)

    def __init__(self, job: JobConfig) -> None:
        self.size = job.train.micro_batch_size

    def batch(self, step: int) -> list[Batch]:
        parts = [part.chunk(RANKS)[dist.get_rank()].split(self.size) for part in global_batch(step)]
        return [Batch(*micro_batch) for micro_batch in zip(*parts, strict=True)]

    def length(self, step: int) -> int:
        return LENGTH

    def bytes_of(self, labels: torch.Tensor) -> int:
        return 1

    def epochs(self, steps: int) -> float:
        return float(steps)


class Notes:
    """A reporter, and a place for checkpoints, that keep what the test asks for."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.moved = 0

    def step(self, number: int, result: Any, measured: Any, *_: Any) -> None:
        self.steps.append(Step(measured.loss, result.grad_norm))
        self.moved += measured.offload.writeback_rows

    def save(self, *_: Any, **__: Any) -> Path:
        return Path()

    def take_ended(self, **_: Any) -> list[Any]:
        return []

    def advance(self, *_: Any) -> None: ...

    def saved(self, *_: Any) -> None: ...

    def message(self, text: str) -> None:
        raise AssertionError(text)


def train(setting: Setting, steps: int) -> dict[str, Any]:
    """Trains through the real loop, engine and tables."""
    from train.engine import Engine
    from train.loaders import HeldOut
    from train.tables import open_tables
    from train.trainer import Trainer

    job, notes = job_of(setting, steps), Notes()
    source: Any = Source(job)
    torch.manual_seed(job.train.seed)
    engine = Engine(
        LanguageModel(job.model),
        optimizer=job.optimizer,
        deepspeed_config=job.deepspeed,
        accumulation_steps=setting.accumulation,
    )
    tables = open_tables(job, addresses(), source, engine.device)
    reporter: Any = notes
    trainer = Trainer(
        job,
        engine=engine,
        tables=tables,
        train_loader=source,
        held_out=[HeldOut("", 1.0, source)],
        checkpoints=reporter,
        reporter=reporter,
    )
    trainer.fit()
    gc.freeze()  # at its end, collections visit again all that ranks were forked with
    assert tables is not None
    tables.close()
    engine.close()
    return {"steps": notes.steps, "moved": notes.moved, "muon": engine.muon_parameters}


def train_all(settings: list[Setting], steps: int) -> dict[Setting, dict[str, Any]]:
    return {setting: train(setting, steps) for setting in settings}


@pytest.fixture(scope="module", params=STEPS)
def steps(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="module")
def runs(steps: int, request: pytest.FixtureRequest) -> list[dict[Setting, dict[str, Any]]]:
    """For each rank what each setting that is asked for came to: all of them in one start of processes."""
    callspecs = [getattr(item, "callspec", None) for item in request.session.items if item.path == request.path]
    asked = {callspec.params.get("setting") for callspec in callspecs if callspec}
    return run_ranks(train_all, RANKS, [setting for setting in SETTINGS if setting in asked], steps)


@pytest.fixture(scope="module")
def plain(steps: int) -> PlainTrainer:
    return PlainTrainer(job_of(SETTINGS[0], steps), addresses(), global_batch)


@pytest.fixture(scope="module")
def expected(plain: PlainTrainer) -> list[Step]:
    return list(plain.fit())


each_setting = pytest.mark.parametrize(
    "setting",
    [pytest.param(setting, marks=() if setting in CHEAP else pytest.mark.long) for setting in SETTINGS],
    ids=lambda s: "-".join(map(str, s)),
)


@each_setting
def test_losses_are_those_of_the_plain_trainer(
    runs: list[dict[Setting, dict[str, Any]]], expected: list[Step], setting: Setting
) -> None:
    """Rounding alone makes two orders of the same batch drift apart by up to 1e-4 of the loss within 50 steps: an
    expert is chosen differently, and Muon lifts what is small. The first steps, where no such thing has happened yet,
    show a gradient that is wrong by a millionth, or a hyperparameter by a percent."""
    for run in runs:
        steps = run[setting]["steps"]
        assert [step.loss for step in steps[:EARLY]] == pytest.approx([e.loss for e in expected[:EARLY]], rel=2e-6)
        norms = [step.grad_norm for step in steps[:EARLY]]
        assert norms == pytest.approx([e.grad_norm for e in expected[:EARLY]], rel=1e-5)
        assert [step.loss for step in steps] == pytest.approx([e.loss for e in expected], rel=5e-4)


@each_setting
def test_rows_travelled(runs: list[dict[Setting, dict[str, Any]]], setting: Setting) -> None:
    assert runs[0][setting]["moved"] > 0


def test_every_part_of_the_recipe_is_at_work(plain: PlainTrainer, expected: list[Step]) -> None:
    clip = plain.job.train.gradient_clipping
    assert clip is not None
    assert all(step.grad_norm > clip for step in expected)
    assert expected[-1].loss < 0.95 * expected[0].loss
    biases = [router.e_score_correction_bias for router in plain.inputs]
    assert all(bias.abs().max() > plain.moe.balance_rate for bias in biases)
    taps = [p for name, p in plain.model.named_parameters() if name.endswith("convolution.weight")]
    assert len(taps) == 2
    assert all(tap.all() for tap in taps)


@each_setting
def test_muon_gets_these_parameters_and_adam_those(runs: list[dict[Setting, dict[str, Any]]], setting: Setting) -> None:
    """The optimizers of the engine, DeepSpeed's layers and partitions included (pytest -s shows the table)."""
    model = LanguageModel(MODEL)
    muon = runs[0][setting]["muon"]
    print()
    for name, parameter in model.named_parameters():
        print(f"{'Muon' if name in muon else 'Adam':5} {name:60} {list(parameter.shape)}")
    assert muon == muon_names(model)
    adams = ("embed_tokens", "lm_head", ".mlp.gate.", "hyper_connection")
    matrices = {name for name, parameter in model.named_parameters() if parameter.dim() > 1}
    assert muon == {name for name in matrices if not any(word in name for word in adams)}


def test_the_convolution_begins_as_the_identity() -> None:
    model = LanguageModel(MODEL)
    taps = [p for name, p in model.named_parameters() if name.endswith("convolution.weight")]
    assert len(taps) == 2
    assert not any(tap.any() for tap in taps)
