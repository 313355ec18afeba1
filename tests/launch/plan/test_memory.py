"""Predicted bytes and counts against those of real engines, real forwards and real launches."""

import gc
import json
import time
from collections import Counter
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from kernels.gather import row_index
from launch.plan.cluster import Cluster
from launch.plan.hardware import Kept, read_catalogue
from launch.plan.launches import launch_count
from launch.plan.memory import budgets
from launch.plan.memory.activations import activations, block_bytes
from launch.plan.memory.backbone import backbone_bytes, count_matrices
from launch.plan.memory.budgets import Budget, device_budget, record_bytes
from launch.plan.memory.fit import smallest_change
from launch.plan.report.machines import _PARTS
from launch.plan.rows.step_rows import StepRows
from model.engram import MemoryRows
from model.transformer import LanguageModel
from offload.transfers import staged
from offload.window.directory import Directory
from offload.window.writebacks import WriteBacks
from tests.distributed import run_ranks
from tests.model.launches import launches
from train.config.file import load
from train.config.job import JobConfig

TINY = Path(__file__).parents[3] / "configs" / "tiny.yaml"
DENSE = ("model.engram=null", "model.moe=null", "model.num_layers=2", "data.sequence_length=32")
CASES = [(1, "bf16", "muon"), (3, "bf16", "adamw")] + [
    pytest.param(case, marks=pytest.mark.long)
    for case in [(0, "bf16", "adamw"), (0, "fp32", "adamw"), (2, "bf16", "adamw"), (2, "fp32", "muon")]
]
BRANCHES = "model.hyper_connections.expansion=4"


def case_job(stage: int, dtype: str, optimizer: str) -> JobConfig:
    settings = (f"deepspeed.zero_optimization.stage={stage}", f"train.dtype={dtype}", f"optimizer.name={optimizer}")
    small = ("deepspeed.zero_optimization.reduce_bucket_size=1000", "model.vocab_size=512")
    return load(TINY, [*DENSE, *small, *settings], JobConfig)


def storages() -> dict[int, torch.UntypedStorage]:
    """All memory that tensors hold, by address; which nobody else has as long as this is kept."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if isinstance(each, torch.Tensor)]
    tensors += [each.grad for each in tensors if each.is_leaf and each.grad is not None]
    return {each.untyped_storage().data_ptr(): each.untyped_storage() for each in tensors if not each.is_meta}


def held_by_an_engine(case: tuple[int, str, str]) -> int:
    """What its tensors hold before its second step."""
    from train.engine import Engine

    job, before = case_job(*case), storages()
    engine = Engine(
        LanguageModel(job.model),
        optimizer=job.optimizer,
        deepspeed_config=job.deepspeed,
        dtype=job.train.dtype,
        accumulation_steps=1,
    )
    tokens_BT, positions_BT = torch.randint(512, (1, 32)), torch.arange(32)[None]
    for step in range(2):
        engine.backward(engine(tokens_BT, positions_BT, (), tokens_BT) / 32)
        if step == 0:
            engine.gradient_norm_squared()
            engine.step(lr_factor=1.0, gradient_scale=1.0)
    return min(held_beyond(before) for _ in range(3))


def held_beyond(before: dict[int, torch.UntypedStorage]) -> int:
    """Bytes of memory that is not among `before`.

    A bucket that was reduced is freed by gloo's thread, which needs the interpreter for it: it gets the time.
    """
    time.sleep(0.05)
    return sum(memory.nbytes() for place, memory in storages().items() if place not in before)


@pytest.mark.parametrize("case", CASES)
def test_a_backbone_s_bytes_are_those_of_a_real_engine(case: tuple[int, str, str]) -> None:
    job = case_job(*case)
    found = backbone_bytes(job, count_matrices(job), Cluster(1, 2, read_catalogue().gpu("h100"), None))
    predicted = found.weights + found.gradients + found.optimizer
    assert run_ranks(held_by_an_engine, 2, case)[0] == pytest.approx(predicted, rel=0.02)


def saved_by_blocks(job: JobConfig, sequences: int, length: int) -> Counter[object]:
    """Bytes a token that a real forward on a CPU keeps for the backward, by block."""
    config, dtype = job.model, {"bf16": torch.bfloat16, "fp32": torch.float32}[job.train.dtype]
    torch.manual_seed(0)
    network = LanguageModel(config).to(dtype)
    seen = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept: list[torch.Tensor] = []
    found: Counter[object] = Counter()
    block: list[object] = ["ends"]

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            kept.append(tensor)  # or its memory would be another's
            found[block[0]] += storage.nbytes() / (sequences * length)
        return tensor

    for number, layer in enumerate(network.model.layers):
        layer.register_forward_pre_hook(lambda *_, number=number: block.__setitem__(0, number))
        layer.register_forward_hook(lambda *_: block.__setitem__(0, "ends"))
    tokens_BT = torch.randint(config.vocab_size, (sequences, length))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network(tokens_BT, torch.arange(length).expand(sequences, length), memory_of(job, tokens_BT), tokens_BT)
    return found


def memory_of(job: JobConfig, tokens_BT: torch.Tensor) -> list[MemoryRows]:
    engram = job.model.engram
    if engram is None:
        return []
    index = row_index(torch.randint(40, (tokens_BT.numel() * engram.lookups_per_token,)), 40)
    return [MemoryRows(torch.randn(40, engram.row_dim, requires_grad=True), index) for _ in engram.layers]


@pytest.mark.parametrize(
    "overrides",
    [
        ("train.dtype=bf16",),
        ("train.dtype=fp32", BRANCHES),
        ("train.dtype=bf16", "model.attention.q_lora_rank=48", BRANCHES, "model.engram.convolution=false"),
        (*DENSE, "train.dtype=fp32", "model.attention.v_dim=8", "model.dense_hidden_size=64"),
    ],
    ids=["plain", "branches", "latent queries", "mostly attention"],
)
def test_activations_are_within_a_tenth_of_what_a_forward_keeps(overrides: tuple[str, ...]) -> None:
    job = load(TINY, overrides, JobConfig)
    width = 2 if job.train.dtype == "bf16" else 4
    kept = saved_by_blocks(job, 2, 128)
    for layer in range(job.model.num_layers):
        assert block_bytes(job.model, layer, width, on_cpu=True) == pytest.approx(kept[layer], rel=0.1)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_what_a_steps_tensors_take_at_once_is_within_a_tenth_of_a_real_steps(
    micro_batches: int, tmp_path: Path
) -> None:
    job = load(TINY, ["data.sequence_length=128"], JobConfig)
    torch.manual_seed(0)
    network = LanguageModel(job.model)
    tokens_BT = torch.randint(job.model.vocab_size, (8, 128))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        for _ in range(micro_batches):
            network(tokens_BT, torch.arange(128).expand(8, 128), memory_of(job, tokens_BT), tokens_BT).backward()
    profiled.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]")
    gradients = 4 * sum(parameter.numel() for parameter in network.parameters())
    predicted = activations(job.model, 8 * 128, 4, on_cpu=True).peak(recompute=False)
    assert max(accumulate(nbytes for _, nbytes in changes)) == pytest.approx(
        predicted + (micro_batches - 1) * gradients, rel=0.1
    )


def test_a_processors_rank_keeps_memory_and_gloo_copies_of_what_it_gathers() -> None:
    """Muon's matrices are the larger of two groups. On one rank two micro-batches are added up; on two there is one."""
    device = (
        read_catalogue()
        .gpu("h100")
        .device.model_copy(
            update={
                "overlaps_launches": False,
                "kept": Kept(bytes=7, share=0.25),
                "kept_adding": Kept(bytes=9, share=0.5),
            }
        )
    )
    here = read_catalogue().gpu("h100").model_copy(update={"device": device})
    job = load(TINY, [*DENSE, "model.vocab_size=64"], JobConfig)
    counted = count_matrices(job)
    taken = activations(job.model, 8 * 32, 4, on_cpu=True).peak(recompute=False)
    alone, shared = (device_budget(job, Cluster(1, ranks, here, None), None).parts for ranks in (1, 2))
    model = 4 * counted.total
    assert alone.keys() <= _PARTS.keys() - {"cuda"}
    assert (alone["gradients"], alone["gathered"]) == (model, 0)
    assert alone["kept"] == pytest.approx(9 + 0.5 * (model + taken + model))
    twice = load(TINY, [*DENSE, "model.vocab_size=64", "train.global_batch_size=32"], JobConfig)
    assert device_budget(twice, Cluster(1, 2, here, None), None).parts["gradients"] == model
    # The part of the reduced gradients, and Muon's copies, where activations were.
    assert (shared["gradients"], shared["gathered"]) == (0, 2 * 4 * counted.muon)
    assert shared["kept"] == pytest.approx(7 + 0.25 * (taken + model))
    assert shared["buffers"] == model + max(0, 4 * 4 * counted.muon + model / 2 - taken)


def test_records_lie_side_by_side_on_a_processor() -> None:
    gpu = read_catalogue().gpu("h100")
    device = gpu.device.model_copy(update={"overlaps_launches": False})
    cpu = gpu.model_copy(update={"device": device})
    job = load(TINY, [], JobConfig)
    numbers = 32 * 3 + 1  # weights, Adam's moments, version
    assert record_bytes(job, Cluster(1, 1, cpu, None)) == (4 * 32, 4 * numbers)
    assert record_bytes(job, Cluster(1, 1, gpu, None)) == (4 * 32, 4 * 104)  # whole sectors of eight


@pytest.mark.parametrize(
    ("settings", "replayed"),
    [((), 2 * 32), (("offload.optimizer.untouched_rows=lazy",), 0), (("offload.optimizer.type=sgd",), 0)],
)
def test_state_is_read_beside_rows_where_missed_steps_are_replayed(settings: tuple[str, ...], replayed: int) -> None:
    job, cluster = load(TINY, settings, JobConfig), Cluster(1, 1, read_catalogue().gpu("h100"), None)
    parts = device_budget(job, cluster, StepRows(lookups=0, unique=0, asked=0, owned=100)).parts
    assert parts["step_rows"] == 4 * 100 * (2 * 32 + replayed)


def test_what_a_window_keeps_beside_its_records_is_what_its_parts_allocate() -> None:
    rows, slots = 1000, 300
    arrays = {**vars(Directory(rows, slots)), **vars(WriteBacks(slots))}.values()
    taken = sum(array.nbytes for array in arrays if isinstance(array, np.ndarray))
    assert taken == budgets._PLACES * rows + budgets._SLOT_BYTES * slots
    assert budgets._STAGED_CHUNKS == 2 * staged._CHUNKS  # in and out
    assert budgets._STAGED_BYTES == staged._CHUNK_BYTES


@pytest.mark.parametrize(
    ("type_", "smaller"),
    [
        ("adam", {("adam", "bf16", "fp32"), ("adam", "fp32", "bf16"), ("rowwise_adagrad", "fp32", "fp32")}),
        ("rowwise_rmsprop", {("rowwise_rmsprop", "fp32", "bf16")}),
    ],
)
def test_smaller_records_are_tried_as_far_as_the_optimizer_has_them(
    type_: str, smaller: set[tuple[str, str, str]]
) -> None:
    tried = set()

    def never_fits(job: JobConfig, cluster: Cluster) -> Budget:
        tried.add((job.offload.optimizer.type, job.offload.optimizer.state_dtype, job.offload.row_dtype))
        return Budget({"all": 1.0}, 0.0)

    job = load(TINY, [f"offload.optimizer.type={type_}"], JobConfig)
    assert smallest_change(job, Cluster(1, 1, read_catalogue().gpu("h100"), None), never_fits, 1000) is None
    assert tried == {(type_, "fp32", "fp32"), *smaller}


def test_recompute_keeps_the_stream_and_one_block() -> None:
    model = load(TINY, [BRANCHES], JobConfig).model
    found = activations(model, 100, 2)
    blocks = [block_bytes(model, layer, 2) for layer in range(3)]
    assert found.kept - found.kept_with_recompute == 100 * (sum(blocks) - max(blocks) - 3 * 4 * 128 * 2)
    assert found.peak(recompute=True) < found.peak(recompute=False)
    on_cpu = [block_bytes(model, layer, 2, on_cpu=True) for layer in range(3)]
    assert activations(model, 100, 2, on_cpu=True).kept == 100 * (sum(on_cpu) + 128 * (8 + 2 * 2))


@pytest.mark.parametrize("overrides", [(), (BRANCHES, "model.attention.q_lora_rank=16", "model.engram.kernel_size=3")])
def test_launches_are_those_that_are_counted(overrides: tuple[str, ...]) -> None:
    model = load(TINY, overrides, JobConfig).model
    assert launch_count(model, 2048) == pytest.approx(launches(model, 2048).total(), abs=3)


def test_a_save_copies_what_the_ranks_share_and_experts_are_spread() -> None:
    """Of 8 experts 4 on each of 2 ranks: no copy is shared, so masters and states of experts are whole on a rank."""
    cluster = Cluster(1, 2, read_catalogue().gpu("h100"), None)
    settings = ("train.dtype=bf16", "optimizer.name=adamw", "deepspeed.zero_optimization.stage=1")
    spread = ("deepspeed.expert_parallel.enabled=true", "deepspeed.expert_parallel.autoep_size=2")
    found: list[Any] = []
    for more in ((), spread):
        job = load(TINY, [*settings, *more], JobConfig)
        counted = count_matrices(job)
        found.append(backbone_bytes(job, counted, cluster))
    whole, parted = found
    assert whole.saved == parted.saved == 12 * counted.total / 2
    assert whole.weights - parted.weights == 2 * counted.experts / 2
    assert whole.optimizer == parted.optimizer
