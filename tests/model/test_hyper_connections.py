"""mHC against its equations, its start as a plain residual, its gain through many layers, and the memory it needs."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.attention import attention_context
from model.config import HyperConnectionsConfig
from model.hyper_connections import BranchedStream, HyperConnection
from model.transformer import LanguageModel
from tests.model.tiny import memories, positions, random_tokens, tiny_config, tiny_model

WIDTH, EPS = 8, 1e-6
Sublayer = Callable[[Tensor], Tensor]


def _connections(
    count: int = 2, expansion: int = 4, std: float = 0.5, dtype: torch.dtype = torch.float64, width: int = WIDTH
) -> nn.ModuleList:
    """Connections whose mappings depend on the token, perturbed by about `std` in every logit."""
    torch.manual_seed(0)
    config = HyperConnectionsConfig(expansion=expansion, alpha_init=1.0)
    made = [HyperConnection(config, width, sublayer=number, norm_eps=EPS) for number in range(count)]
    with torch.no_grad():
        for connection in made:
            connection.weight.normal_(std=std / (expansion * width) ** 0.5)
            connection.bias.add_(torch.randn_like(connection.bias), alpha=std)
            connection.alpha.mul_(torch.tensor([0.9, 1.0, 1.1]))
    return nn.ModuleList(made).to(dtype)


def _stream(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def _through(connections: nn.ModuleList, stream: Tensor, sublayer: Sublayer) -> Tensor:
    branched = BranchedStream(stream)
    for connection in connections:
        branched.write(sublayer(branched.read(connection)))  # type: ignore[arg-type]
    return branched.merged()


def _by_the_equations(connections: nn.ModuleList, stream: Tensor, sublayer: Sublayer) -> Tensor:
    """Equations 3, 7, 8 and 9 of the paper, sublayer by sublayer."""
    for connection in connections:
        n, (a_pre, a_post, a_res), b = connection.config.expansion, connection.alpha, connection.bias
        x = stream.flatten(2)
        normed = x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS)
        pre = torch.sigmoid(a_pre * normed @ connection.weight[:n].T + b[:n])
        post = 2 * torch.sigmoid(a_post * normed @ connection.weight[n : 2 * n].T + b[n : 2 * n])
        res = torch.exp((a_res * normed @ connection.weight[2 * n :].T + b[2 * n :]).unflatten(-1, (n, n)))
        for _ in range(connection.config.sinkhorn_iterations):
            res = res / res.sum(-2, keepdim=True)
            res = res / res.sum(-1, keepdim=True)
        output = sublayer((pre.unsqueeze(2) @ stream).squeeze(2))
        stream = res @ stream + post.unsqueeze(3) * output.unsqueeze(2)
    return stream


@pytest.mark.parametrize("expansion", [2, 4])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_equals_the_equations_with_gradients(expansion: int, count: int) -> None:
    connections, stream = _connections(count, expansion), _stream(2, 5, expansion, WIDTH)
    actual, expected = (way(connections, stream, torch.tanh) for way in (_through, _by_the_equations))
    torch.testing.assert_close(actual, expected)
    leaves, upstream = [stream, *connections.parameters()], torch.randn_like(actual)
    torch.testing.assert_close(*(torch.autograd.grad(y, leaves, upstream) for y in (actual, expected)))


def test_gradcheck_through_two_sublayers() -> None:
    connections, stream = _connections(expansion=2, width=3), _stream(1, 2, 2, 3)
    parameters = dict(connections.named_parameters())

    def function(stream: Tensor, *values: Tensor) -> Tensor:
        def run(stream: Tensor) -> Tensor:
            return _through(connections, stream, torch.tanh)

        return torch.func.functional_call(_Function(connections, run), _prefixed(parameters, values), (stream,))

    assert torch.autograd.gradcheck(function, (stream, *parameters.values()))


class _Function(nn.Module):
    def __init__(self, connections: nn.ModuleList, run: Sublayer) -> None:
        super().__init__()
        self.connections, self.run = connections, run

    def forward(self, stream: Tensor) -> Tensor:
        return self.run(stream)


def _prefixed(parameters: dict[str, Any], values: Sequence[Tensor]) -> dict[str, Tensor]:
    return {f"connections.{name}": value for name, value in zip(parameters, values, strict=True)}


def test_writing_without_reading_is_refused() -> None:
    with pytest.raises(RuntimeError, match="after its input was read"):
        BranchedStream(_stream(1, 2, 4, WIDTH)).write(_stream(1, 2, WIDTH))


# What the model is with and without branches


def _outcome(model: LanguageModel) -> Iterator[Tensor]:
    tokens, place = random_tokens(2, 12), positions(7, 5, batch=2)
    dtype = model.lm_head.weight.dtype
    yield model(tokens, place, memories(model, 2, 12, dtype))
    model(tokens, place, memories(model, 2, 12, dtype), tokens).backward()
    yield from (parameter.grad for parameter in model.parameters() if parameter.grad is not None)


def test_expansion_one_is_a_plain_residual_bit_by_bit() -> None:
    plain = tiny_model()
    single = tiny_model(hyper_connections=HyperConnectionsConfig(expansion=1))
    assert plain.state_dict().keys() == single.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(_outcome(plain), _outcome(single), strict=True))


def _untouched(**changes: Any) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(tiny_config(engram=None, norm_eps=1e-20, **changes)).double()


@pytest.mark.parametrize("expansion", [2, 4])
def test_at_the_start_the_network_computes_what_a_plain_one_does(expansion: int) -> None:
    tokens, place = random_tokens(2, 12), positions(7, 5, batch=2)
    branched = _untouched(hyper_connections=HyperConnectionsConfig(expansion=expansion))(tokens, place)
    torch.testing.assert_close(branched, _untouched()(tokens, place), rtol=1e-9, atol=1e-12)


def test_branches_part_from_the_first_steps_on() -> None:
    model = _untouched(hyper_connections=HyperConnectionsConfig())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    tokens, place = random_tokens(4, 12), positions(12, batch=4)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = model(tokens, place, labels_BT=tokens)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert not [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    bias = model.get_parameter("model.layers.0.attn_hyper_connection.bias")
    assert bias[4:8].unique().numel() == 4, "all branches are written alike"


def test_engram_is_added_to_every_branch_before_it_is_read() -> None:
    model = tiny_model(torch.float64, hyper_connections=HyperConnectionsConfig())
    block, place, memory = model.model.layers[1], positions(6), memories(model, 1, 6, torch.float64)[0]
    seen: list[Tensor] = []
    block.attn_hyper_connection.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[1]))
    stream = _stream(1, 6, 4, 16)
    block(stream, attention_context(place, model.config.attention, stream.dtype), place, memory)
    torch.testing.assert_close(seen[0] - stream, block.engram(stream, memory, place))


def test_names_and_shapes_of_the_parameters() -> None:
    model = tiny_model(hyper_connections=HyperConnectionsConfig())
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if "hyper_connection" in name}
    assert shapes == {
        f"model.layers.{layer}.{sublayer}_hyper_connection.{name}": shape
        for layer in range(3)
        for sublayer in ("attn", "mlp")
        for name, shape in {"weight": (24, 4 * 16), "bias": (24,), "alpha": (3,)}.items()
    }
    engram = dict(model.model.layers[1].engram.named_parameters())
    assert sum(name.startswith("key_projs.") for name in engram) == 4
    assert sum(name.startswith("value_proj.") for name in engram) == 1


# Signals through many layers

_LOGITS_TO_IDENTITY = (torch.eye(4) - 3 * (2 * torch.eye(4) - 1)).flatten()
"""Takes the static part of four residual mappings from where it begins as logits to the identity."""


def _gains(layers: int, std: float, *, identity: bool) -> tuple[float, float]:
    """Largest absolute row and column sum of the residual mappings' product, two a layer: forward, backward gain.

    `identity`: the static part is the identity itself and not a logit, as unconstrained mappings begin.
    """
    product = torch.eye(4, dtype=torch.float64)
    connections = _connections(2 * layers, std=std, dtype=torch.float32)
    with torch.no_grad():
        for number, connection in enumerate(connections):
            if identity:
                connection.bias[8:] += _LOGITS_TO_IDENTITY
            stream = torch.randn(1, 64, 4, WIDTH, generator=torch.Generator().manual_seed(number))
            product = connection(None, stream)[2].double() @ product
    return product.sum(-1).abs().max().item(), product.sum(-2).abs().max().item()


@pytest.mark.parametrize("layers", [30, 60])
@pytest.mark.parametrize("std", [0.3, 1.0])
def test_gain_stays_near_one_where_unconstrained_mappings_explode(
    layers: int, std: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, backward = _gains(layers, std, identity=False)
    assert forward == pytest.approx(1, abs=1e-5)
    assert backward == pytest.approx(1, abs=0.25)  # 1.6 in the paper, figure 7
    monkeypatch.setattr("model.hyper_connections.sinkhorn", lambda logits, _: logits)
    assert min(_gains(layers, std, identity=True)) > 1e5


@pytest.mark.parametrize("layers", [30, 60])
def test_signals_and_gradients_pass_silent_layers_unamplified(layers: int) -> None:
    connections = _connections(2 * layers, std=0.5, dtype=torch.float32)
    stream = first = _stream(1, 8, 4, WIDTH, dtype=torch.float32)
    for layer in range(layers):
        stream = _through(connections[2 * layer : 2 * layer + 2], stream, torch.zeros_like)  # type: ignore[arg-type]
    assert stream.abs().max() <= first.abs().max() * (1 + 1e-4)
    torch.testing.assert_close(stream.mean(dim=2), first.mean(dim=2), rtol=0, atol=0.1)
    # Constant mappings: what flows back through them alone.
    with torch.no_grad():
        maps = [connection(None, first)[2] for connection in connections]
    passed = start = _stream(1, 8, 4, WIDTH, dtype=torch.float32)
    for mapping in maps:
        passed = mapping @ passed
    gradient = torch.autograd.grad(passed.sum(), start)[0]
    assert 0.75 < gradient.min() <= gradient.max() < 1.25


def _embedding_gradient(layers: int, expansion: int, *, identity: bool = False) -> float:
    """Norm of the loss's gradient at the embedding of a dense network, with perturbed mappings; `identity` as above."""
    torch.manual_seed(0)
    config = HyperConnectionsConfig(expansion=expansion)
    changes = {"num_layers": layers, "dense_layers": 0, "moe": None, "engram": None, "hyper_connections": config}
    model = LanguageModel(tiny_config(**changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "hyper_connection" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
            if identity and name.endswith("hyper_connection.bias"):
                parameter[8:] += _LOGITS_TO_IDENTITY
    model(random_tokens(2, 12), positions(12, batch=2), labels_BT=random_tokens(2, 12, seed=2)).backward()
    gradient = model.model.embed_tokens.weight.grad
    assert gradient is not None
    return gradient.norm().item()


@pytest.mark.parametrize("layers", [30, 60])
def test_a_deep_network_has_the_gradients_of_a_plain_one(layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = _embedding_gradient(layers, expansion=1)
    assert 1 / 2 < _embedding_gradient(layers, expansion=4) / reference < 2
    monkeypatch.setattr("model.hyper_connections.sinkhorn", lambda logits, _: logits)
    assert _embedding_gradient(layers, expansion=4, identity=True) / reference > 20


# Memory


def _kept_bytes(way: Callable[..., Tensor], connections: nn.ModuleList, stream: Tensor) -> float:
    """Bytes of the distinct storages that the backward keeps, a token; parameters not counted."""
    storages: dict[int, int] = {}
    held = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        held.append(tensor)  # so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        way(connections, stream, torch.neg)  # keeps nothing of its own
    for parameter in connections.parameters():
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(storages.values()) / (stream.shape[0] * stream.shape[1])


@pytest.mark.parametrize("expansion", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_for_the_backward_is_what_the_module_states(expansion: int, dtype: torch.dtype) -> None:
    n, width, tokens = expansion, 128, 40
    connections = _connections(2, n, dtype=dtype, width=width)
    kept = _kept_bytes(_through, connections, _stream(4, tokens // 4, n, width, dtype=dtype))
    stated = (n + 2) * width * dtype.itemsize + 4 * (7 * n * n + 16 * n + 3)
    # In bf16 a step keeps its factors in fp32 too; neither belongs to a token.
    small = 4 * 2 * (n * n + 2 * n) / tokens
    assert stated <= kept <= stated + small
    if dtype == torch.float32:
        assert _kept_bytes(_by_the_equations, connections, _stream(4, 10, n, width, dtype=dtype)) > 2.5 * kept


def test_compiles_to_one_graph_with_the_same_results() -> None:
    connections = _connections(2, dtype=torch.float32)
    for connection in connections:
        connection.config = connection.config.model_copy(update={"sinkhorn_iterations": 2})
    stream = _stream(2, 5, 4, WIDTH, dtype=torch.float32)

    def run(stream: Tensor) -> Tensor:
        return _through(connections, stream, torch.tanh)

    leaves = [stream, *connections.parameters()]
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    one, other = (way(stream) for way in (run, compiled))
    torch.testing.assert_close(other, one)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), leaves) for y in (other, one)))


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_a_gpu_computes_what_the_equations_say_in_fp64(dtype: torch.dtype, tolerance: float) -> None:
    connections, stream = _connections(width=64, dtype=dtype), _stream(2, 37, 4, 64, dtype=dtype)
    wide = _connections(width=64)
    wide.load_state_dict(connections.state_dict())
    on_gpu = connections.to("cuda")
    leaf = stream.detach().to("cuda").requires_grad_()
    actual = _through(on_gpu, leaf, torch.neg)
    wide_leaf = stream.detach().double().requires_grad_()
    expected = _by_the_equations(wide, wide_leaf, torch.neg)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    grads = torch.autograd.grad(actual, [leaf, *on_gpu.parameters()], upstream.to("cuda"))
    right = torch.autograd.grad(expected, [wide_leaf, *wide.parameters()], upstream.double())
    for one, other in zip((actual, *grads), (expected, *right), strict=True):
        largest = float(other.detach().abs().max())
        torch.testing.assert_close(one.detach().cpu().double(), other.detach(), rtol=0, atol=tolerance * largest)
