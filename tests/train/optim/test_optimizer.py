import itertools
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import EngramConfig, HyperConnectionsConfig, ModelConfig, MoEConfig
from model.parameters import kind_of
from model.transformer import LanguageModel
from train.optim.flat_parts import Run
from train.optim.muon import Orthogonalizer, matrix_shape, newton_schulz, pieces_of
from train.optim.optimizer import OptimizerConfig, assign


def model_shapes():
    config = ModelConfig(
        vocab_size=64,
        hidden_size=32,
        num_layers=2,
        moe=MoEConfig(),
        engram=EngramConfig(),
        hyper_connections=HyperConnectionsConfig(),
    )
    return {name: tuple(parameter.shape) for name, parameter in LanguageModel(config).named_parameters()}


def test_muon_gets_the_matrices_and_adam_the_rest():
    keys = assign(OptimizerConfig(), model_shapes())
    muon = {name for name, key in keys.items() if key.muon}
    ends = {name.split(".", 3)[-1] for name in muon if name.startswith("model.layers.1.")}
    assert ends == {
        *(f"engram.key_projs.{branch}.weight" for branch in range(4)),
        "engram.value_proj.weight",
        "mlp.experts.down_proj",
        "mlp.experts.gate_up_proj",
        "mlp.shared_experts.down_proj.weight",
        "mlp.shared_experts.gate_proj.weight",
        "mlp.shared_experts.up_proj.weight",
        "self_attn.kv_a_proj_with_mqa.weight",
        "self_attn.kv_b_proj.weight",
        "self_attn.o_proj.weight",
        "self_attn.q_proj.weight",
    }
    assert "model.layers.0.mlp.gate_proj.weight" in muon
    assert not muon & {"model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.gate.weight"}
    shapes = model_shapes()
    assert muon == {name for name in shapes if kind_of(name).linear and len(shapes[name]) > 1}


@pytest.mark.parametrize("shape", [(7,), (7, 1, 4), (2, 64), (64, 1)])
def test_what_is_no_matrix_gets_adam(shape):
    name = "model.layers.0.engram.key_norm_weight" if shape == (2, 64) else "model.layers.0.weight"
    assert not assign(OptimizerConfig(), {name: shape})[name].muon


def test_only_vectors_are_not_decayed():
    keys = assign(OptimizerConfig(), model_shapes())
    assert {name for name, key in keys.items() if not key.decay} == {n for n, s in model_shapes().items() if len(s) < 2}


def test_adamw_takes_everything():
    assert not any(key.muon for key in assign(OptimizerConfig(name="adamw"), model_shapes()).values())


@pytest.mark.parametrize("shape", [(8, 8), (5, 20), (20, 5)])
def test_newton_schulz_keeps_singular_vectors_and_evens_out_values(shape):
    matrix = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    result = newton_schulz(matrix, 5, torch.float32)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    values = left.mT @ result @ right.mT
    assert torch.allclose(values, values.diagonal(dim1=-2, dim2=-1).diag_embed(), atol=1e-4)
    assert values.diagonal(dim1=-2, dim2=-1).max() < 1.3
    assert torch.linalg.matrix_norm(result - left @ right).max() < 0.35 * min(shape) ** 0.5


def test_newton_schulz_agrees_with_torchs_muon():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(12, 30))
    before, gradient = weight.detach().clone(), torch.randn(12, 30)
    weight.grad = gradient.clone()
    torch.optim.Muon([weight], lr=1.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
    ours = newton_schulz(gradient.unsqueeze(0), 5, torch.bfloat16)[0].float() * 0.2 * 30**0.5
    assert torch.linalg.vector_norm((before - weight.detach()) - ours) < 0.05 * torch.linalg.vector_norm(ours)


def test_a_zero_gradient_gives_a_zero_update():
    assert not newton_schulz(torch.zeros(1, 3, 4), 5, torch.float32).any()


def test_a_fused_projection_is_two_matrices():
    assert matrix_shape(Run("layers.0.experts.gate_up_proj", (4, 6, 5), 0, 1, 0)) == (3, 5)
    assert matrix_shape(Run("layers.0.gate_up_proj.weight", (6, 5), 0, 1, 0)) == (3, 5)
    assert matrix_shape(Run("layers.0.up_proj.weight", (6, 5), 0, 1, 0)) == (6, 5)


@given(cuts=st.lists(st.integers(0, 120), max_size=6), offset=st.integers(0, 9))
def test_pieces_tile_their_runs_and_stay_in_their_matrices(cuts, offset):
    borders = sorted({0, 120, *cuts})
    runs = [Run("experts.gate_up_proj", (4, 6, 5), a, b - a, offset + a) for a, b in itertools.pairwise(borders)]
    pieces = list(pieces_of(runs))
    elements = [p.matrix[1] * 15 + i for p in pieces for i in range(p.start, p.start + p.numel)]
    assert elements == list(range(120))
    assert all(p.start + p.numel <= 15 and p.offset == offset + p.matrix[1] * 15 + p.start for p in pieces)


class Ranks(threading.local):
    """Stands for torch.distributed: one thread a rank, and an all-to-all through shared memory."""

    def __init__(self, world_size, mail, barrier):
        self.world_size, self.mail, self.barrier = world_size, mail, barrier

    def get_rank(self, group=None):
        return self.rank

    def all_to_all_single(self, output, inputs, output_split_sizes, input_split_sizes, group):
        self.mail[self.rank] = inputs.split(input_split_sizes)
        self.barrier.wait(timeout=20)
        received = [self.mail[source][self.rank] for source in range(self.world_size)]
        assert [len(part) for part in received] == output_split_sizes
        output.copy_(torch.cat(received))
        self.barrier.wait(timeout=20)


def load_run(flat, run, whole):
    """Copies one run of the whole parameter into its place in `flat`."""
    flat[run.offset : run.offset + run.numel] = whole.reshape(-1)[run.start : run.start + run.numel]


SHAPES = {"a.weight": (6, 10), "experts.gate_up_proj": (3, 8, 5), "b.weight": (4, 3)}


@st.composite
def partitionings(draw):
    """Each parameter cut anywhere, or copied to every rank; a rank may hold nothing."""
    world_size = draw(st.integers(1, 4))
    layout, ends = [[] for _ in range(world_size)], [0] * world_size
    for name, shape in SHAPES.items():
        numel = math.prod(shape)
        cuts = sorted(draw(st.lists(st.integers(0, numel), min_size=world_size - 1, max_size=world_size - 1)))
        places = list(itertools.pairwise([0, *cuts, numel]))
        if draw(st.booleans()):
            places = [(0, numel)] * world_size
        for rank, (start, end) in enumerate(places):
            offset = ends[rank] + draw(st.integers(0, 2))
            if end > start:
                layout[rank].append(Run(name, shape, start, end - start, offset))
                ends[rank] = offset + end - start
    return layout


@given(layout=partitionings())
@settings(max_examples=40)
def test_any_partitioning_gives_the_update_of_whole_matrices(layout):
    torch.manual_seed(0)
    whole = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    expected = {}
    for name, tensor in whole.items():
        matrices = tensor.view(6, 4, 5) if "gate_up" in name else tensor.unsqueeze(0)
        scale = 0.2 * max(matrices.shape[1:]) ** 0.5
        expected[name] = newton_schulz(matrices, 5, torch.float32).reshape(tensor.shape) * scale
    ranks = Ranks(len(layout), {}, threading.Barrier(len(layout)))

    def work(rank):
        ranks.rank = rank
        flat = torch.zeros(sum(run.numel for run in layout[rank]) + 6)
        for run in layout[rank]:
            load_run(flat, run, whole[run.name])
        Orthogonalizer(layout, ranks, torch.device("cpu"))(flat, 5, torch.float32, 0.2)
        return flat

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(len(layout)) as pool:
        patch.setattr("train.optim.muon.dist", ranks)
        flats = list(pool.map(work, range(len(layout))))
    for runs, flat in zip(layout, flats, strict=True):
        target = torch.zeros_like(flat)
        for run in runs:
            load_run(target, run, expected[run.name])
        torch.testing.assert_close(flat, target, atol=1e-5, rtol=1e-4)
