"""Fused multiply-add in Triton's interpreter, rounded once as on every GPU: it multiplies, rounds, adds and rounds."""

import numpy as np
import pytest
from numpy.typing import NDArray
from triton.runtime import interpreter

Float32s = NDArray[np.float32]


def fma(x: Float32s, y: Float32s, z: Float32s) -> Float32s:
    """x y + z, rounded once: the product is exact in float64, and its sum with z is rounded to odd before it is cut."""
    with np.errstate(invalid="ignore", over="ignore"):
        product, addend = x.astype(np.float64) * y, z.astype(np.float64)
        total = np.asarray(product + addend)
        back = total - product
        rest = (product - (total - back)) + (addend - back)
        even = total.view(np.int64) % 2 == 0
        odd = np.nextafter(total, np.copysign(np.inf, rest))
        return np.where((rest != 0) & even & np.isfinite(total), odd, total).astype(np.float32)


def install(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gives the interpreter this operation. Returns a list that grows by one for each."""
    calls: list[int] = []

    def create_fma(_: object, x: object, y: object, z: object) -> object:
        calls.append(1)
        return interpreter.TensorHandle(fma(x.data, y.data, z.data), z.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", create_fma)
    return calls
