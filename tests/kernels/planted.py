"""A kernel that writes behind the end of a tensor: a program for compute-sanitizer to find fault with."""

import torch
import triton
import triton.language as tl


@triton.jit
def _planted_kernel(values: tl.tensor, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)
    tl.store(values + places, places)


def main() -> None:
    values = torch.zeros(100, dtype=torch.int32, device="cuda")
    _planted_kernel[(1,)](values, 1024)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
