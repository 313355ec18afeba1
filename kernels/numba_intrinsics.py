"""How loops over records are compiled for a CPU, and operations of LLVM that Numba does not expose."""

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from kernels.compiled_cache import keep_compiled

AHEAD = 4
"""How many rows ahead of their use records are asked for."""
_LINE = 64  # bytes of a cache line


def compiled(function: Any) -> Any:
    """Compiles loops, which release the GIL, for each set of types that they are called with."""
    dispatcher = njit(nogil=True, error_model="numpy", boundscheck=False)(function)
    keep_compiled(dispatcher, function)
    return dispatcher


def inlined(function: Any) -> Any:
    """For what loops do with each row: compiled as a part of its caller. To pass the arrays of a call takes as long as
    a row."""
    return njit(inline="always", error_model="numpy", boundscheck=False)(function)


def _make_fma(_: Any, a: Any, b: Any, c: Any) -> Any:
    return types.float32(types.float32, types.float32, types.float32), lambda _, builder, __, args: builder.fma(*args)


def _make_prefetch(_: Any, address: Any) -> Any:
    def generate(_: Any, builder: Any, __: Any, args: Any) -> None:
        pointer, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        function = builder.module.declare_intrinsic(
            "llvm.prefetch", [pointer], ir.FunctionType(ir.VoidType(), [pointer, word, word, word])
        )
        read, soon, data = (word(value) for value in (0, 3, 1))
        builder.call(function, [builder.inttoptr(args[0], pointer), read, soon, data])

    return types.void(types.uintp), generate


def _make_stream(_: Any, target: Any, source: Any) -> Any:
    def generate(_: Any, builder: Any, __: Any, args: Any) -> None:
        line = ir.VectorType(ir.FloatType(), _LINE // 4).as_pointer()
        words = builder.load(builder.inttoptr(args[1], line))
        words.align = 4
        store = builder.store(words, builder.inttoptr(args[0], line), align=_LINE)
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))

    return types.void(types.uintp, types.uintp), generate


def _make_fence(_: Any) -> Any:
    def generate(_: Any, builder: Any, __: Any, ___: Any) -> None:
        builder.fence("seq_cst")

    return types.void(), generate


fma: Any = intrinsic(_make_fma)
"""fma(a, b, c): a b + c in float32, rounded once."""

stream_line: Any = intrinsic(_make_stream)
"""stream_line(to, from): copies a cache line to an address (uintp) that begins one, past the caches: memory that is too
large for them need not be read before it is written. To be followed by `fence` before another thread reads it."""

fence: Any = intrinsic(_make_fence)

_prefetch: Any = intrinsic(_make_prefetch)  # of the line at an address (uintp), which need not be valid


@inlined
def ask_ahead(records, rows, place, end):  # type: ignore[no-untyped-def]
    """Prefetches a record into the cache: that of the row a few after `rows[place]`, if it comes before `rows[end]`.

    Rows are scattered, so the processor cannot guess where the next one is.
    """
    if place + AHEAD < end:
        ask(records, rows[place + AHEAD], records.shape[1])


@inlined
def ask_word(records, row, word):  # type: ignore[no-untyped-def]
    """Prefetches one word of a record into the cache."""
    _prefetch(records.ctypes.data + row * records.strides[0] + word * records.itemsize)


@inlined
def ask(records, row, words):  # type: ignore[no-untyped-def]
    """Prefetches the first words of a record into the cache."""
    first = records.ctypes.data + row * records.strides[0]
    for offset in range(0, words * records.itemsize, _LINE):
        _prefetch(first + offset)
