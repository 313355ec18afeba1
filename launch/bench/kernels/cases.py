"""The kernels at the sizes of a training step: what each is given, and the bytes that it has to move.

Shape suffixes: N lookups, U unique rows, D columns of a row, W words of a record, C slots, B batch, T sequence, S
sub-tables, M branches.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from kernels.gate import engram_gate, reference_backward, reference_forward
from kernels.gather import RowIndex, gather, row_index
from kernels.gather.segment_sum import segment_sum
from kernels.hash import HashSpec, hash_ngrams
from kernels.hash.reference import hash_ngrams_reference
from kernels.records import fetch_records, write_records
from kernels.records.row_init import initial_rows
from launch.bench.clock import Run
from launch.bench.host_link import HostLink
from launch.bench.workload import Workload
from offload.addresses.hashing import choose_primes, draw_multipliers
from offload.rows.records import padded_words

_VOCABULARY = 129_280
_LAYERS, _HEADS, _ORDERS = 2, 8, (2, 3)  # 16 rows per token and layer, as in the paper's models
_ROWS_PER_HEAD = 2_262_400
_DIM = 80
_BRANCHES = 4
_ADAM_WORDS = 3 * _DIM + 1


@dataclass(frozen=True)
class Case:
    """One kernel on one input.

    Attributes:
        kernel: what it does, for the report.
        sizes: of the input, for the report.
        nbytes: read and written by the best possible implementation.
        ours: runs it through its public function.
        reference: the same in plain PyTorch; None where that is what runs here anyway.
        prepare: restores the input before each run.
        limit: what bounds its speed.
    """

    kernel: str
    sizes: str
    nbytes: int
    ours: Run
    reference: Run | None = None
    prepare: Run | None = None
    limit: Literal["memory", "link to the device", "link to the host"] = "memory"


@dataclass(frozen=True)
class Sizes:
    """What the inputs are made for.

    Attributes:
        device: where the kernels run.
        tokens: of a step.
        hidden: width of the model that contains the gate.
        host_bytes: of host memory that records are fetched from.
    """

    device: torch.device
    tokens: int
    hidden: int
    host_bytes: int

    @property
    def on_gpu(self) -> bool:
        """Whether a public function and its reference differ."""
        return self.device.type == "cuda"

    @cached_property
    def index(self) -> tuple[RowIndex, int]:
        """Lookups of one layer as a plan has them, and their unique rows."""
        ids_N = Workload(self.tokens * len(_ORDERS) * _HEADS, rows=4_000_000).ids(0)
        unique_U, inverse_N = ids_N.unique(return_inverse=True)
        return row_index(inverse_N, len(unique_U)).to(self.device), len(unique_U)

    def random(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        """Normal values."""
        return (torch.randn(*shape, device=self.device) * scale).to(dtype)


def hash_cases(sizes: Sizes) -> Iterator[Case]:
    """N-gram hash of all modules in one launch."""
    spec = HashSpec(
        torch.tensor([draw_multipliers(layer, _ORDERS[-1], _VOCABULARY, 0) for layer in range(_LAYERS)]),
        moduli_LS := torch.tensor(choose_primes(_LAYERS, [_ROWS_PER_HEAD] * len(_ORDERS), _HEADS)),
        moduli_LS.cumsum(1) - moduli_LS,
        _ORDERS,
        0,
    ).to(sizes.device)
    tokens_BT = torch.randint(_VOCABULARY, (1, sizes.tokens), device=sizes.device)
    positions_BT = torch.arange(sizes.tokens, device=sizes.device)[None] % 1024
    arguments = (tokens_BT, positions_BT, spec)
    yield Case(
        "hash",
        f"{sizes.tokens:,} tokens, {_LAYERS} layers x {moduli_LS.shape[1]} heads",
        8 * (2 + moduli_LS.numel()) * sizes.tokens,
        lambda: hash_ngrams(*arguments),
        (lambda: hash_ngrams_reference(*arguments)) if sizes.on_gpu else None,
    )


def gather_cases(sizes: Sizes) -> Iterator[Case]:
    """Rows to lookups, and lookups' gradients to rows."""
    index, unique = sizes.index
    lookups, index_N = len(index.segment_N), index.index_N
    rows_UD = sizes.random(unique, _DIM)
    for dtype in (torch.float32, torch.bfloat16):
        name = f"{lookups:,} lookups of {unique:,} rows x {_DIM}, {'fp32' if dtype == torch.float32 else 'bf16'}"
        grad_ND = sizes.random(lookups, _DIM, dtype=dtype, scale=1e-3)
        yield Case(
            "gather forward",
            name,
            4 * lookups + 4 * unique * _DIM + grad_ND.nbytes,
            _bind(gather, rows_UD, index, out_dtype=dtype),
            _bind(lambda wanted: rows_UD.index_select(0, index_N).to(wanted), dtype) if sizes.on_gpu else None,
        )
        backward = torch.ops.engram.gather_backward.default
        yield Case(
            "gather backward",
            name,
            4 * (2 * lookups + unique) + 4 * unique * _DIM + grad_ND.nbytes,
            _bind(backward, grad_ND, *index.tensors, index.num_rows, torch.float32),
            _bind(_summed, grad_ND, index) if sizes.on_gpu else None,
        )


def _summed(grad_ND: Tensor, index: RowIndex) -> Tensor:
    return segment_sum(grad_ND.float(), index.order_N, index.offsets_V)


def record_cases(sizes: Sizes) -> Iterator[Case]:
    """Whole records between host memory and the device."""
    _, unique = sizes.index
    words = padded_words(_ADAM_WORDS, sizes.device)
    link = HostLink(sizes.device, sizes.host_bytes, unique * words * 4)
    try:
        host_RW, window_CW = link.host_records(words), link.device_records(words)
        count = min(unique, len(host_RW))
        rows_U, slots_U = link.draw_rows(count, words, ordered=True), link.draw_slots(count)
        plain_RW = link.host_N[: host_RW.numel()].view(host_RW.shape)
        rows = f"{count:,} records of {4 * words} bytes, ascending"
        moved = count * 4 * words * (1 if sizes.on_gpu else 2)  # on a CPU read and written in the same memory
        cpu_rows_U = rows_U.cpu()

        def plain_fetch() -> None:
            window_CW.index_copy_(0, slots_U, plain_RW.index_select(0, cpu_rows_U).to(sizes.device))

        def plain_write() -> None:
            plain_RW.index_copy_(0, cpu_rows_U, window_CW.index_select(0, slots_U).cpu())

        yield Case(
            "records fetch",
            rows,
            moved,
            lambda: fetch_records(host_RW, rows_U, window_CW, slots_U),
            plain_fetch,
            limit="link to the device" if sizes.on_gpu else "memory",
        )
        yield Case(
            "records write",
            rows,
            moved,
            lambda: write_records(window_CW, slots_U, host_RW, rows_U),
            plain_write,
            limit="link to the host" if sizes.on_gpu else "memory",
        )
    finally:
        link.close()


def initial_row_cases(sizes: Sizes) -> Iterator[Case]:
    """Values of rows that were never updated."""
    _, unique = sizes.index
    ids_U = torch.arange(unique, device=sizes.device) * 7
    yield Case(
        "initial rows",
        f"{unique:,} rows x {_DIM}, fp32",
        8 * unique + 4 * unique * _DIM,
        lambda: initial_rows(ids_U, _DIM, seed=0, std=0.02),
    )


def gate_cases(sizes: Sizes) -> Iterator[Case]:
    """The context gate, forward and backward."""
    dtype = torch.bfloat16 if sizes.on_gpu else torch.float32
    shape = (1, sizes.tokens, _BRANCHES, sizes.hidden)
    hidden, key = (sizes.random(*shape, dtype=dtype) for _ in range(2))
    value = sizes.random(1, sizes.tokens, sizes.hidden, dtype=dtype)
    weight = torch.ones(_BRANCHES, sizes.hidden, device=sizes.device)
    inputs = (hidden, key, value, weight, weight.clone())
    name = f"{sizes.tokens:,} tokens x {_BRANCHES} branches x {sizes.hidden}, {'bf16' if sizes.on_gpu else 'fp32'}"
    yield Case(
        "gate forward",
        name,
        3 * hidden.nbytes + value.nbytes,
        lambda: engram_gate(*inputs, eps=1e-20, signed_sqrt=True),
        (lambda: reference_forward(*inputs, 1e-20, True)) if sizes.on_gpu else None,
    )
    grad = torch.randn_like(hidden)
    _, saved = torch.ops.engram.gate.default(*inputs, 1e-20, True)
    yield Case(
        "gate backward",
        name,
        5 * hidden.nbytes + 2 * value.nbytes,
        lambda: torch.ops.engram.gate_backward.default(grad, *inputs, saved, True),
        (lambda: reference_backward(grad, *inputs, saved, True)) if sizes.on_gpu else None,
    )


def _bind(function: Callable[..., Any], *arguments: Any, **named: Any) -> Run:
    return lambda: function(*arguments, **named)
