"""Where a Triton kernel is tested: in the interpreter on CPU tensors, and on a GPU where there is one."""

import os

import pytest
import torch


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernel_device(request: pytest.FixtureRequest) -> torch.device:
    """The device of the tensors to call a `kernels.*_triton` function with."""
    if request.param == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are compiled here: no interpreter for CPU tensors")
    return torch.device(request.param)
