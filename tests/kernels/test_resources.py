"""No kernel spills registers; the list of what they take has all of them."""

import re
from pathlib import Path

import pytest

from tests.kernels.resources import resources_of_all

KERNELS = Path(__file__).parents[2] / "kernels"


def launched_kernels() -> set[str]:
    """Functions that Triton compiles and that no other one calls."""
    source = "\n".join(text for text in map(Path.read_text, KERNELS.rglob("*.py")) if "@triton.jit" in text)
    compiled = re.findall(r"@triton\.jit.*?\ndef (\w+)\(", source, re.DOTALL)
    return {name for name in compiled if len(re.findall(rf"\b{name}\(", source)) == compiled.count(name)}


@pytest.mark.long
def test_every_kernel_is_compiled_for_an_h100_and_none_spills() -> None:
    found = resources_of_all()
    assert {name for name, _ in found} == launched_kernels()
    assert {(name, needs.stack) for name, needs in found if needs.stack} == set()
