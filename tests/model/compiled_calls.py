"""Counts the calls in what torch.compile makes of the blocks for an H100, without one.

`python -m tests.model.compiled_calls configs/bench.yaml`. The blocks are traced on a CPU, in a GPU's implementations.
Inductor then gets their graphs as if their tensors were on a GPU, and is stopped when it has written its code: what
that calls is counted each time that the graph would run. Much of it is Inductor's own that is replaced here: this is a
tool of the torch release it was written with, 2.13.
"""

import contextlib
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._inductor import compile_fx
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from triton.runtime import driver
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from model.compilation import compile_blocks
from model.config import ModelConfig
from model.transformer import LanguageModel
from tests.kernels.ahead_of_time import _AbsentGPU
from tests.model.launches import micro_batch, narrow

_GPU = torch.device("cuda", 0)
_H100 = SimpleNamespace(
    name="H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    total_memory=80 * 2**30,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 * 2**20,
    gcnArchName="",
)
_CALL = re.compile(r"(?:= |^\s*)(?:(triton)_\w+\.run|(extern_kernels\.\w+)|torch\.ops\.([\w.]+))\(", re.MULTILINE)


class _CodeWritten(Exception):
    pass


def compiled_calls(config: ModelConfig) -> Counter[str]:
    """What the compiled blocks call in a bf16 micro-batch, forward and backward, by name; Triton's kernels together."""
    torch.manual_seed(0)
    network = LanguageModel(narrow(config)).to(torch.bfloat16)
    counted: Counter[str] = Counter()
    compile_blocks(network, backend=lambda graph, inputs: compile_fx.compile_fx(graph, inputs, _counting(counted)))
    with _traced_as_on_a_gpu(), _inductor_with_a_gpu():
        network(*micro_batch(config)).backward()
    return counted


def _counting(counted: Counter[str]) -> Callable[..., Any]:
    def compile_inner(graph: GraphModule, inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
        calls = Counter(next(filter(None, call)) for call in _CALL.findall(_code(graph, inputs, options)))

        def run(values: list[Any]) -> Any:
            counted.update(calls)
            return graph(*values)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    return compile_inner


def _code(graph: GraphModule, inputs: Sequence[Any], options: dict[str, Any]) -> str:
    """What Inductor would run, from the definition of its function on."""
    there, inputs = _on_the_gpu(graph, inputs)
    mode = detect_fake_mode(inputs)
    written: list[str] = []

    def keep(_lowering: GraphLowering, code: Any) -> None:
        written.append(code.value)
        raise _CodeWritten

    kept = {key: options.get(key, False) for key in ("is_backward", "is_inference")}
    with (
        mock.patch.object(GraphLowering, "_compile_to_module_lines", keep),
        mock.patch.object(FakeTensor, "copy_", lambda self, *_: self, create=True),  # asks for a real GPU
        tracing(TracingContext(mode)),
        V.set_fake_mode(mode),
        V.set_debug_handler(compile_fx.DebugContext()),
        contextlib.suppress(_CodeWritten),
    ):
        compile_fx.fx_codegen_and_compile(
            there, inputs, inputs_to_check=(), cpp_wrapper=False, fx_wrapper=False, aot_mode=False, cudagraphs=False,
            static_input_idxs=(), graph_id=options.get("graph_id"), layout_opt=None, boxed_forward_device_index=None,
            extern_node_serializer=None, **kept,
        )  # fmt: skip
    return written[0][written[0].index("def call") :]


def _on_the_gpu(graph: GraphModule, inputs: Sequence[Any]) -> tuple[GraphModule, list[Any]]:
    mode, copied = detect_fake_mode(inputs), Graph()
    result, output = copied.graph_copy(graph.graph, {}, return_output_node=True)
    copied.output(result).meta.update(output.meta)
    for node in copied.nodes:
        if node.kwargs.get("device") is not None:
            node.kwargs = {**node.kwargs, "device": _GPU}
    there = GraphModule(graph, copied)
    moved = [FakeTensor(mode, _meta(value), _GPU) if isinstance(value, Tensor) else value for value in inputs]
    FakeTensorProp(there, mode=mode).propagate_dont_convert_inputs(*moved)
    return there, moved


def _meta(tensor: Tensor) -> Tensor:
    size, stride = (tuple(map(int, numbers)) for numbers in (tensor.size(), tensor.stride()))
    with torch.utils._python_dispatch._disable_current_modes():
        return torch.empty_strided(size, stride, dtype=tensor.dtype, device="meta")


@contextlib.contextmanager
def _inductor_with_a_gpu() -> Iterator[None]:
    found = {
        "get_device_properties": _H100, "is_available": True, "is_bf16_supported": True, "get_compute_capability": 90,
        "is_triton_capable": True, "raise_if_triton_unavailable": None, "current_device": 0, "device_count": 1,
    }  # fmt: skip
    before = driver._active
    driver.set_active(_AbsentGPU(90))
    with contextlib.ExitStack() as patches:
        for name, value in found.items():
            patches.enter_context(mock.patch.object(CudaInterface, name, return_value=value))
        for owner, name, value in (
            (CudaInterface.Worker, "get_device_properties", _H100),
            (torch.cuda, "get_device_properties", _H100),
            (torch.cuda, "get_device_capability", (9, 0)),
            (torch.cuda, "current_device", 0),
        ):
            patches.enter_context(mock.patch.object(owner, name, return_value=value))
        patches.enter_context(mock.patch.object(torch._inductor.config, "fx_graph_cache", False))
        yield
    driver._active = before


@contextlib.contextmanager
def _traced_as_on_a_gpu() -> Iterator[None]:
    always = ("kernels.branches._fused", "kernels.branches.maps._fused", "kernels.branches.sinkhorn._fused")
    with contextlib.ExitStack() as patches:
        for name in (*always, "model.moe._grouped_mm_fits"):
            patches.enter_context(mock.patch(name, new=_yes))
        patches.enter_context(mock.patch("model.attention.attend", new=_attend))
        patches.enter_context(mock.patch("model.attention.documents", return_value=None))
        product = mock.patch("kernels.branches.projections_triton.product", new=lambda a, b: a.float() @ b.float())
        patches.enter_context(product)
        for function in (InterpretedFunction, JITFunction):
            patches.enter_context(mock.patch.object(function, "run", return_value=None))
        yield


def _yes(*_arguments: object) -> bool:  # no mock, which would be traced
    return True


def _attend(query: Tensor, key: Tensor, value: Tensor, *_how: object) -> Tensor:
    attended: Tensor = _flex_attention(*(tensor.transpose(1, 2) for tensor in (query, key, value))).transpose(1, 2)
    return attended


@torch.library.custom_op("tests::flex_attention", mutates_args=())
def _flex_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """In place of FlexAttention, which the compiler only takes where there is a GPU."""
    return torch.zeros(*query.shape[:-1], value.shape[-1], dtype=query.dtype)


@_flex_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return query.new_empty(*query.shape[:-1], value.shape[-1])


@torch.library.custom_op("tests::flex_attention_backward", mutates_args=())
def _flex_attention_backward(grad: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(tensor) for tensor in inputs]


@_flex_attention_backward.register_fake
def _(grad: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor in inputs]


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    return tuple(_flex_attention_backward(grad, list(ctx.saved_tensors)))


_flex_attention.register_autograd(_differentiate, setup_context=_save)


def _main(paths: list[str]) -> None:
    from train.config.file import load
    from train.config.job import JobConfig

    for path in paths:
        torch._dynamo.reset()
        counted = compiled_calls(load(path, [], JobConfig).model)
        print(f"{path}: the blocks make {counted.total()} calls a micro-batch")
        for name, count in counted.most_common():
            print(f"{count:7} {name}")


if __name__ == "__main__":
    _main(sys.argv[1:])
