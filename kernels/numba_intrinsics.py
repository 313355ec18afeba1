"""What LLVM can do and Numba has no name for."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_LINE = 64  # bytes of a cache line


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


fma: Any = intrinsic(_make_fma)
"""fma(a, b, c): a b + c in float32, rounded once."""

prefetch: Any = intrinsic(_make_prefetch)
"""prefetch(address): asks for a cache line that is going to be read; `address` is a uintp, and need not be valid."""
