"""The transfer engines for a GPU, by the names that `offload.engine` gives them: what is known before one is opened.

`auto` is one of these on a GPU. `cpu` carries nothing: its window is in host memory too. Importing this does not import
torch: the config and commands read it.
"""

from typing import NamedTuple


class EngineFacts(NamedTuple):
    """Who carries records.

    Attributes:
        fetches_by_kernels, writes_back_by_kernels: kernels, which reach into pinned host memory; else the CPU gathers
            them into staging buffers, which the GPU's copy engines transfer.
    """

    fetches_by_kernels: bool
    writes_back_by_kernels: bool

    @property
    def pins(self) -> bool:
        """Whether the tables must be pinned, which those in a file cannot be."""
        return self.fetches_by_kernels or self.writes_back_by_kernels

    @property
    def stages(self) -> bool:
        """Whether it has staging buffers, in host memory and on the device."""
        return not (self.fetches_by_kernels and self.writes_back_by_kernels)


ENGINES = {
    "zero_copy": EngineFacts(fetches_by_kernels=True, writes_back_by_kernels=True),
    "staged": EngineFacts(fetches_by_kernels=False, writes_back_by_kernels=False),
    "mixed": EngineFacts(fetches_by_kernels=True, writes_back_by_kernels=False),
}
