"""Contract tests of the engine: DeepSpeed 0.19.8 does, at every ZeRO stage, what a plain trainer does."""

import itertools
import math
import os
import pickle
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from model.config import ModelConfig, MoEConfig
from model.transformer import LanguageModel
from tests.distributed import free_port, run_ranks
from tests.train.reference import ACCUMULATION, CLIP, PlainTrainer, Toy, micro_batch
from tests.warm import warm_process
from train.config.deepspeed import DeepSpeedConfig
from train.optim.clipping import clip_scale
from train.optim.optimizer import OptimizerConfig
from train.optim.pieces import StatePiece, TensorInfo, check_covered

RANKS, STEPS, STOP = 2, 5, 2
EXPERT_CASES = [(0, "adamw"), pytest.param((1, "muon"), marks=pytest.mark.long), (2, "muon"), (3, "muon")]
EXPERT_SIZES = [(None,), (None, 2), (2, None)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COMBINATIONS = [
    (stage, dtype, name, offload)
    for stage, dtype, name, offload in itertools.product((0, 1, 2, 3), DTYPES, ("adamw", "muon"), ("none", "cpu"))
    if offload == "none" or (stage > 0 and (dtype, name) == ("bf16", "muon"))
]
# Every wrapper of DeepSpeed's, and every stage with both optimizers.
CHEAP = {
    (stage, dtype, name, "none")
    for stage, dtype, name in itertools.product(range(3), DTYPES, ("adamw", "muon"))
    if (stage % 2 == 0) == ((dtype, name) in {("fp32", "adamw"), ("bf16", "muon")})
} | {(3, "fp32", "adamw", "none"), (1, "bf16", "muon", "cpu"), (3, "bf16", "muon", "cpu")}
WRAPPERS = {
    (0, "fp32"): "BackboneOptimizer",
    (0, "bf16"): "FP16_UnfusedOptimizer",
    (1, "fp32"): "DeepSpeedZeroOptimizer",
    (1, "bf16"): "BF16_Optimizer",
    (2, "fp32"): "DeepSpeedZeroOptimizer",
    (2, "bf16"): "DeepSpeedZeroOptimizer",
    (3, "fp32"): "DeepSpeedZeroOptimizer_Stage3",
    (3, "bf16"): "DeepSpeedZeroOptimizer_Stage3",
}


def optimizer_config(name):
    return OptimizerConfig(
        name=name, learning_rate=0.03, muon_learning_rate=0.05, adam_parameters=["*embed*", "*gate.*"]
    )


def lr_factor(step):
    return 1.0 - 0.1 * step


def build(model, combination, accumulation_steps=ACCUMULATION, **expert_parallel):
    from train.engine import Engine

    stage, dtype, name, offload = combination
    section = {
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 20,
            "sub_group_size": 100,
            "reduce_bucket_size": 1000,
            "offload_optimizer": {"device": offload, "pin_memory": False},
        },
        "expert_parallel": expert_parallel,
    }
    return Engine(
        model,
        optimizer=optimizer_config(name),
        deepspeed_config=DeepSpeedConfig.model_validate(section),
        dtype=dtype,
        accumulation_steps=accumulation_steps,
    )


def accumulate(engine, step, poison=False):
    """All micro-batches of a step; returns the mean loss and the gradient of the step's leaf."""
    rank, losses = dist.get_rank(), []
    leaf = micro_batch(step, 0, rank)[2][0].requires_grad_()
    for number in range(ACCUMULATION):
        tokens, labels, (_, index) = micro_batch(step, number, rank)
        loss = engine(tokens, labels, (leaf, index))
        losses.append(loss.item())
        engine.backward(loss / ACCUMULATION * (math.nan if poison and rank == 1 else 1.0))
    return sum(losses) / ACCUMULATION, leaf.grad


def train(engine, steps):
    """The steps' losses, squared gradient norms and leaf gradients."""
    records = []
    for step in steps:
        loss, leaf_gradient = accumulate(engine, step)
        norm_squared = engine.gradient_norm_squared().item()
        engine.step(lr_factor=lr_factor(step), gradient_scale=clip_scale(norm_squared, CLIP))
        records.append({"loss": loss, "norm_squared": norm_squared, "leaf": leaf_gradient})
    return records


def evaluate(engine):
    """A forward without gradients between two steps, which must not disturb them."""
    engine.module.eval()
    with torch.no_grad():
        engine(*micro_batch(55, 0, 0))
    engine.module.train()


@dataclass
class Image:
    """An engine's whole state, as `train.optim.pieces.SavedState`."""

    steps: int
    whole: dict[str, torch.Tensor]

    @property
    def tensors(self):
        return {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in self.whole.items()}

    def beginning(self, tensor):
        """See `SavedState.beginning`: all must be there."""

    def pieces(self, wanted):
        """Pieces that are cut in other places than the ranks' parts are."""
        for name, tensor in self.whole.items():
            length = max(17, tensor.numel() // 5)
            for start in range(0, tensor.numel(), length):
                values = tensor.view(-1)[start : start + length]
                if wanted(name, start, len(values)):
                    yield StatePiece(name, start, values)

    @property
    def parameters(self):
        """By parameter, its weight and its optimizer's state."""
        found = {}
        for tensor, values in self.whole.items():
            slot, _, name = tensor.partition("/")
            if slot != "buffer":
                found.setdefault(name, {})[slot] = values
        return found

    @property
    def buffers(self):
        return {name.removeprefix("buffer/"): values for name, values in self.whole.items() if "buffer/" in name}


def shared_state(engine, piece_bytes=64):
    """The engine's state on every rank, put together from all ranks' parts, each of which it must have once."""
    everyones = [None] * dist.get_world_size()
    # Pickling a tensor takes twenty times as long as an array.
    dist.all_gather_object(
        everyones, [(*piece[:2], piece.values.numpy()) for piece in engine.state_pieces(piece_bytes)]
    )
    pieces, infos = list(itertools.chain(*everyones)), engine.state_tensors()
    check_covered(infos, [(name, start, len(values)) for name, start, values in pieces])
    whole = {name: torch.empty(math.prod(info.shape), dtype=info.dtype) for name, info in infos.items()}
    for name, start, values in pieces:
        assert values.nbytes <= piece_bytes
        assert values.dtype == whole[name].numpy().dtype
        whole[name][start : start + len(values)] = torch.from_numpy(values)
    return Image(engine.steps, {name: values.view(infos[name].shape) for name, values in whole.items()})


def load_state(engine, state):
    engine.check_state(state)
    engine.load_state(state)
    engine.publish_state()


def exercise(combination):
    """Trains, drops two steps on the way, and does the second part once more in a new engine from the saved state."""
    engine = build(Toy(), combination)
    first = train(engine, range(STOP))
    stopped = shared_state(engine)
    evaluate(engine)
    accumulate(engine, 77)
    engine.skip_step()
    accumulate(engine, 78, poison=True)
    poisoned_norm = engine.gradient_norm_squared().item()
    engine.skip_step()
    after_skips = shared_state(engine)
    records = first + train(engine, range(STOP, STEPS))
    result = {
        "wrapper": type(engine._engine.optimizer).__name__,
        "muon": engine.muon_parameters,
        "poisoned_norm": poisoned_norm,
        "stopped": stopped,
        "after_skips": after_skips,
        "records": records,
        "state": shared_state(engine),
    }
    engine.close()
    resumed = build(Toy(seed=9), combination)
    load_state(resumed, stopped)
    result["resumed_records"] = train(resumed, range(STOP, STEPS))
    result["resumed_state"] = shared_state(resumed)
    resumed.close()
    return result


def exercise_all(combinations, cases, stages):
    """Everything in one start of processes; pickled, as tensors sent by themselves need their sender alive."""
    runs = {combination: exercise(combination) for combination in combinations}
    experts = {case: exercise_expert_parallel(*case) for case in cases}
    return pickle.dumps((runs, experts, {stage: misuse(stage) for stage in stages}))


@pytest.fixture(scope="module")
def chosen(request):
    """The combinations, the cases of spread experts and the stages of misuse that the tests of this run ask for."""
    callspecs = [getattr(item, "callspec", None) for item in request.session.items if item.path == request.path]
    asked = [(name, value) for callspec in callspecs if callspec for name, value in callspec.params.items()]
    return [[*dict.fromkeys(v for name, v in asked if name == of)] for of in ("combination", "case", "stage")]


@pytest.fixture(scope="module")
def all_runs(chosen):
    return [pickle.loads(result) for result in run_ranks(exercise_all, RANKS, *chosen)]


@pytest.fixture(scope="module")
def runs(all_runs):
    return [combinations for combinations, _, _ in all_runs]


@pytest.fixture(scope="module")
def expert_runs(all_runs):
    return [experts for _, experts, _ in all_runs]


def plain_run(dtype, name):
    """The plain trainer's records and weights."""
    trainer = PlainTrainer(Toy(), optimizer_config(name), RANKS, DTYPES[dtype])
    records = []
    for step in range(STEPS):
        norm_squared = trainer.step(lambda number, rank, step=step: micro_batch(step, number, rank), lr_factor(step))
        records.append({"norm_squared": norm_squared, "leaves": trainer.row_gradients})
    return records, trainer.masters


@pytest.fixture(scope="module")
def plain():
    return {(dtype, name): plain_run(dtype, name) for dtype, name in itertools.product(DTYPES, ("adamw", "muon"))}


def same_state(one, other):
    return (
        one.steps == other.steps
        and one.parameters.keys() == other.parameters.keys()
        and all(
            torch.equal(one.parameters[n][s], other.parameters[n][s]) for n in one.parameters for s in one.parameters[n]
        )
    )


def cases(combinations):
    """Parameters of a test; what is not cheap is long."""
    return [
        combination if combination in CHEAP else pytest.param(combination, marks=pytest.mark.long)
        for combination in combinations
    ]


def identifier(case):
    return "-".join(map(str, case))


each_combination = pytest.mark.parametrize("combination", cases(COMBINATIONS), ids=identifier)


@each_combination
def test_weights_are_those_of_the_plain_trainer(runs, plain, combination):
    _, dtype, name, _ = combination
    _, masters = plain[dtype, name]
    state = runs[0][combination]["state"]
    assert state.steps == STEPS
    assert state.parameters.keys() == masters.keys()
    initial = dict(Toy().named_parameters())
    for parameter, weight in masters.items():
        saved = state.parameters[parameter]["weight"]
        assert saved.dtype == torch.float32
        if dtype == "fp32":
            torch.testing.assert_close(saved, weight, atol=2e-5, rtol=1e-4)
        elif weight.numel() > 10:
            # Rounding of activations differs; the way that the weights went must be the same.
            way, expected = saved - initial[parameter].detach(), weight - initial[parameter].detach()
            assert torch.cosine_similarity(way.flatten(), expected.flatten(), dim=0) > 0.97, parameter


@each_combination
def test_norm_is_that_of_the_raw_gradient_and_the_same_on_all_ranks(runs, plain, combination):
    _, dtype, name, _ = combination
    by_rank = [[record["norm_squared"] for record in run[combination]["records"]] for run in runs]
    assert by_rank[0] == by_rank[1]
    expected = [record["norm_squared"] for record in plain[dtype, name][0]]
    assert max(expected) > CLIP**2
    assert by_rank[0] == pytest.approx(expected, rel=1e-4 if dtype == "fp32" else 0.1)


@each_combination
def test_leaves_get_this_ranks_raw_gradient(runs, plain, combination):
    _, dtype, name, _ = combination
    for rank, run in enumerate(runs):
        for record, expected in zip(run[combination]["records"], plain[dtype, name][0], strict=True):
            tolerance = {"atol": 1e-5, "rtol": 1e-3} if dtype == "fp32" else {"atol": 0.01, "rtol": 0.1}
            torch.testing.assert_close(record["leaf"], expected["leaves"][rank], **tolerance)


@each_combination
def test_a_skipped_step_changes_no_bit(runs, combination):
    run = runs[0][combination]
    assert same_state(run["stopped"], run["after_skips"])


@each_combination
def test_a_gradient_that_is_not_finite_on_one_rank_is_seen_by_all(runs, combination):
    assert not any(math.isfinite(run[combination]["poisoned_norm"]) for run in runs)


@each_combination
def test_resuming_continues_with_the_same_bits(runs, combination):
    for run in runs:
        records, resumed = run[combination]["records"][STOP:], run[combination]["resumed_records"]
        assert [r["loss"] for r in records] == [r["loss"] for r in resumed]
        assert [r["norm_squared"] for r in records] == [r["norm_squared"] for r in resumed]
    assert same_state(runs[0][combination]["state"], runs[0][combination]["resumed_state"])


@each_combination
def test_muon_updates_the_parameters_that_the_config_means(runs, combination):
    stage, dtype, name, offload = combination
    run = runs[1][combination]
    matrices = {"proj.weight", "back.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    assert run["muon"] == (matrices | {"unused_matrix", "lm_head.weight"} if name == "muon" else set())
    for parameter, slots in run["state"].parameters.items():
        states = {"momentum_buffer"} if parameter in run["muon"] else {"exp_avg", "exp_avg_sq"}
        assert slots.keys() == {"weight", *states}
    # The wrappers that `train.engine.zero` was written for; offloading accumulates in another one.
    expected = WRAPPERS[stage, dtype] if offload == "none" or stage != 1 else "DeepSpeedZeroOptimizer"
    assert run["wrapper"] == expected


@pytest.mark.parametrize("combination", COMBINATIONS[:1], ids=identifier)
def test_buffers_are_saved(runs, combination):
    run = runs[0][combination]
    assert run["state"].buffers["calls"].tolist() == [ACCUMULATION * (STEPS + 2) + 1] * 2
    assert run["resumed_state"].buffers["calls"].tolist() == [ACCUMULATION * STEPS] * 2


def moe_model():
    torch.manual_seed(3)
    experts = MoEConfig(num_experts=4, expert_hidden_size=12, routed_scaling_factor=1.5)
    return LanguageModel(ModelConfig(vocab_size=32, hidden_size=16, num_layers=2, dense_hidden_size=24, moe=experts))


def train_moe(engine, steps):
    norms = []
    for step in steps:
        for number in range(ACCUMULATION):
            generator = torch.Generator().manual_seed(1000 * step + 10 * number + dist.get_rank())
            tokens, labels = torch.randint(0, 32, (2, 2, 8), generator=generator)
            engine.backward(engine(tokens, torch.arange(8).expand(2, 8), labels_BT=labels) / (16 * ACCUMULATION))
        norms.append(engine.gradient_norm_squared().item())
        engine.step(lr_factor=0.5, gradient_scale=clip_scale(norms[-1], CLIP))
    return norms


def exercise_expert_parallel(stage, name):
    """Three steps, the last of them from the saved state with experts spread another way."""
    combination, results = (stage, "fp32", name, "none"), {}
    for sizes in EXPERT_SIZES:
        norms, state = [], None
        for steps, size in zip((range(3),) if len(sizes) == 1 else (range(2), range(2, 3)), sizes, strict=True):
            engine = build(moe_model(), combination, **({"enabled": True, "autoep_size": size} if size else {}))
            if state is not None:
                load_state(engine, state)
            norms += train_moe(engine, steps)
            state = shared_state(engine, piece_bytes=1000)
            engine.close()
        results[sizes] = {"norms": norms, "state": state, "muon": engine.muon_parameters}
    return results


@pytest.mark.parametrize("case", EXPERT_CASES, ids=identifier)
def test_spreading_experts_changes_neither_training_nor_the_image(expert_runs, case):
    results = expert_runs[0][case]
    alone = results[None,]
    assert {name for name, _ in moe_model().named_parameters()} == alone["state"].parameters.keys()
    for sizes, result in results.items():
        assert result["norms"] == pytest.approx(alone["norms"], rel=1e-4), sizes
        assert result["muon"] == alone["muon"]
        assert result["state"].buffers.keys() == alone["state"].buffers.keys()
        for name, slots in alone["state"].parameters.items():
            for slot, tensor in slots.items():
                torch.testing.assert_close(result["state"].parameters[name][slot], tensor, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("case", EXPERT_CASES, ids=identifier)
def test_ranks_agree_on_the_norm_with_spread_experts(expert_runs, case):
    for sizes in EXPERT_SIZES:
        assert expert_runs[0][case][sizes]["norms"] == expert_runs[1][case][sizes]["norms"]


def message_of(call, *args, **kwargs):
    """What a call raises."""
    try:
        call(*args, **kwargs)
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def misuse(stage):
    """The messages of calls that are wrong, by kind."""
    engine = build(Toy(), (stage, "fp32", "adamw", "none"))
    messages = {"early": message_of(engine.step, lr_factor=1.0)}
    accumulate(engine, 0)
    messages["late"] = message_of(accumulate, engine, 1)
    engine.close()
    engine = build(Toy(), (stage, "fp32", "adamw", "none"))
    state = shared_state(engine)
    messages["other optimizer"] = message_of(build(Toy(), (stage, "fp32", "muon", "none")).check_state, state)
    state.whole["weight/proj.weight"] = torch.zeros(3, 3)
    messages["other shape"] = message_of(engine.check_state, state)
    messages["other ranks"] = message_of(
        build, moe_model(), (stage, "fp32", "adamw", "none"), enabled=True, autoep_size=4
    )
    return messages


@pytest.mark.parametrize(
    "stage", [pytest.param(stage, marks=() if stage % 3 == 0 else pytest.mark.long) for stage in range(4)]
)
def test_misuse_is_told_in_a_line(all_runs, stage):
    for _, _, messages in all_runs:
        assert messages[stage]["early"] == "RuntimeError: 0 of 2 micro-batches were given to backward"
        assert messages[stage]["late"] == "RuntimeError: backward was called more than 2 times before a step"
        assert (
            "deepspeed.expert_parallel.autoep_size 4 does not divide the number of ranks, 2"
            in (messages[stage]["other ranks"])
        )
        assert "has no momentum_buffer of" in messages[stage]["other optimizer"]
        assert "weight of proj.weight has shape [3, 3], this model's has [7, 6]" in messages[stage]["other shape"]


def with_muon(combinations):
    return [combination for combination in combinations if combination[2] == "muon"]


def continue_alone(folder):
    """Continues all runs of two ranks on one rank, which computes what both would have, with no compiler in reach."""
    for name in ("CC", "CXX"):
        os.environ.pop(name, None)
    said = os.open(folder / "said", os.O_WRONLY | os.O_CREAT)
    os.dup2(said, 1)
    os.dup2(said, 2)
    dist.init_process_group("gloo")
    stopped = pickle.loads((folder / "stopped").read_bytes())
    states = {}
    for combination in stopped:
        engine = build(Toy(seed=5), combination, RANKS * ACCUMULATION)
        load_state(engine, stopped[combination])
        for step in range(STOP, STEPS):
            for rank, number in itertools.product(range(RANKS), range(ACCUMULATION)):
                engine.backward(engine(*micro_batch(step, number, rank)) / (RANKS * ACCUMULATION))
            scale = clip_scale(engine.gradient_norm_squared().item(), CLIP)
            engine.step(lr_factor=lr_factor(step), gradient_scale=scale)
        states[combination] = shared_state(engine)
        engine.close()
    (folder / "states").write_bytes(pickle.dumps(states))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def alone(runs, tmp_path_factory):
    """The exit code of one rank in a process of its own, and the folder of what it printed, built and came to."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "stopped").write_bytes(pickle.dumps({c: runs[0][c]["stopped"] for c in with_muon(runs[0])}))
    environment = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "DS_ACCELERATOR": "cpu",
        "PATH": str(folder / "empty"),
        "TORCH_EXTENSIONS_DIR": str(folder / "built"),
    }
    process = warm_process(continue_alone, folder, **environment)
    process.start()
    process.join(120)
    process.kill()
    process.join()
    return folder, process.exitcode


def test_no_compiler_is_needed_or_used_and_nothing_is_printed(alone):
    folder, code = alone
    assert (code, (folder / "said").read_text()) == (0, "")
    assert not (folder / "built").exists()


@pytest.mark.parametrize("combination", cases(with_muon(COMBINATIONS)), ids=identifier)
def test_another_number_of_ranks_continues_the_run(runs, alone, combination):
    states = pickle.loads((alone[0] / "states").read_bytes())
    expected = runs[0][combination]["state"]
    assert states[combination].steps == expected.steps
    tolerance = {"atol": 2e-5, "rtol": 1e-4} if combination[1] == "fp32" else {"atol": 0.02, "rtol": 0.05}
    for name, slots in expected.parameters.items():
        torch.testing.assert_close(states[combination].parameters[name]["weight"], slots["weight"], **tolerance)
