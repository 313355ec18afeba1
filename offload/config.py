"""What a job may say about its tables in host memory."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, Field, model_validator

from offload.engines import ENGINES
from offload.optimizers import OPTIMIZERS

RowDtype = Literal["fp32", "bf16"]
if TYPE_CHECKING:
    OptimizerName = str
    EngineName = str
else:
    OptimizerName = Literal[tuple(OPTIMIZERS)]
    EngineName = Literal["auto", *ENGINES, "cpu"]


class LinkConfig(
    BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True, allow_inf_nan=False
):
    """An emulated bus between host memory and the window: transfers take time, but no processor time."""

    bytes_per_second: float = Field(gt=0)
    """Bandwidth of each direction, in bytes/s (PCIe 5 x16 is about 55e9)."""
    latency_s: float = Field(0.0, ge=0)
    """Seconds before the first byte of every transfer."""


class TableOptimizerConfig(
    BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True, allow_inf_nan=False
):
    """The optimizer of the table rows. There is no weight decay: the paper's Table 5 sets it to 0."""

    type: OptimizerName = Field(
        "adam", description=f"{'; '.join(f'`{name}` keeps {each.keeps}' for name, each in OPTIMIZERS.items())}."
    )
    untouched_rows: Literal["exact", "closed", "lazy"] = "exact"
    """`exact` applies the zero-gradient steps that a row missed when it is next used, so the result equals the dense
    optimizer: Adam's steps are replayed, RMSprop's mean square decays. `closed` evaluates Adam's missed steps at once,
    within 1e-6 of their effect, at a cost that does not grow with their number; for other optimizers it is `exact`.
    `lazy` leaves untouched rows as they are. It makes no difference for optimizers that do nothing without a gradient,
    such as Adagrad."""
    state_dtype: RowDtype = "fp32"
    """Dtype of the optimizer state in host memory and in the window. `bf16` (Adam only) halves the size of the moments:
    an update and the steps replayed before it are computed in fp32 and rounded once, stochastically, keyed by seed, row
    and step."""
    lr_factor: float = Field(5.0, gt=0)
    """The rows' learning rate, as a multiple of the backbone's (5 in the paper's Table 5)."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Adam's decay of the first moment."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """Adam's decay of the second moment, and RMSprop's of the mean square."""
    eps: float = Field(1e-8, gt=0)
    """Added to the denominator."""

    @model_validator(mode="after")
    def _optimizer_takes_these_settings(self) -> "TableOptimizerConfig":
        OPTIMIZERS[self.type].check(self)
        return self


class OffloadConfig(
    BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True, allow_inf_nan=False
):
    """Where table rows are kept, and how they are transferred."""

    row_dtype: RowDtype = "fp32"
    """Dtype of row weights in host memory and in the window. `bf16` takes half the space: each update is computed in
    fp32 and rounded stochastically, keyed by seed, row and step. (For optimizer state: `optimizer.state_dtype`.)"""
    exchange_dtype: RowDtype = "fp32"
    """Dtype in which rows are sent from their owners to the ranks that use them, rounded to nearest; a single rank
    rounds too. Gradients are sent and summed in fp32."""

    mode: Literal["window", "resident"] = "window"
    """`window`: tables in host memory, the rows of upcoming steps in a window of slots on the device. `resident`: every
    row of this rank's shard on the device; the reference that `window` equals bit by bit."""
    depth: Annotated[int, Field(ge=0, le=64)] | Literal["auto"] = 1
    """Look-ahead: how many steps before its use a row may be fetched. 0 fetches synchronously. `auto` tries 1, 2 and 4
    in the first steps of a run, keeps the smallest that waits hardly longer than the best, and tries again once many
    more rows travel. Losses do not depend on it."""
    window_rows: int = Field(65536, ge=1, le=2**31 - 1)
    """Slots (rows) in each rank's window. It must hold all rows of any single step that the rank owns."""
    planner: Literal["auto", "cpu", "device"] = "auto"
    """Where the rows of upcoming steps are computed from token ids (hashing, sorting, deduplication). `cpu`: on cores
    that the training loop leaves free. `device`: on the GPU, beside the model, for machines with few cores per GPU.
    `auto` means `cpu`: its plans are ready before their steps, and leave the GPU to the model. Both give the same
    bits."""
    planner_threads: int = Field(1, ge=1, le=1_024)
    """Cores per rank for planning upcoming steps."""
    engine: EngineName = "auto"
    """How rows are copied between host memory and the window. `zero_copy`: GPU kernels access host memory directly,
    which is pinned for them. `staged`: the CPU gathers rows into small pinned buffers, which the GPU's copy engines
    transfer; the tables need not be pinned. `mixed` fetches like `zero_copy` and writes back like `staged`, for jobs
    whose limit is the GPU, on machines with cores to spare. `cpu`: the window is in host memory too. `auto` means `cpu`
    without a GPU; otherwise it times all three when the run starts, on all ranks at once, beside matrix products and
    beside a loop of small launches, and takes the one with which the slowest rank is fastest. All give the same
    bits."""
    programs: int | None = Field(None, ge=1, le=1024)
    """Triton programs per kernel of the engines `zero_copy` and `mixed`: the number of SMs on which a copy runs beside
    the model's kernels. More programs copy faster until the bus is saturated, but slow the model down on more SMs. null
    means that of 4, 8 and 16 with which matrix products beside a copy are done first, measured when the run starts, on
    all ranks at once; without a GPU it means 8."""
    host_file: str | None = None
    """A folder on a local disk of every machine: each rank keeps its shard in a file there, for tables larger than
    memory. Rows are read ahead and written back past the system's cache, many at a time; the window is all that is kept
    of them. The file is written whole at the start and released however the run ends: records are padded to sectors of
    512 bytes. null keeps the shard in memory."""
    host_touch: bool | None = None
    """Allocate all of a shard's memory at the start, in parallel and in huge pages where available: a slower start, but
    no page faults in the first steps. false allocates each page when it is first written. null means true where a GPU
    reads the memory directly, which needs all of it at the start anyway, and false otherwise."""
    emulate_link: LinkConfig | None = None
    """Make each transfer take as long as on this emulated link; null copies at full speed."""
    optimizer: TableOptimizerConfig = TableOptimizerConfig()
    """The optimizer of the table rows."""
    verify: bool = False
    """Recompute every step in a simple, synchronous way, and stop at the first difference. Slow; needs as much
    additional host memory as the records of all rows that were ever updated."""

    @property
    def pins(self) -> bool:
        """Whether the engine named here must pin the tables; `auto` does if it can."""
        return self.engine in ENGINES and ENGINES[self.engine].pins

    @model_validator(mode="after")
    def _file_needs_host_memory(self) -> "OffloadConfig":
        if self.host_file is not None and self.mode == "resident":
            raise ValueError(
                "host_file has no meaning with mode=resident, which keeps no rows in host memory: set it to null"
            )
        if self.host_file is not None and self.host_touch:
            raise ValueError("host_touch has no meaning with host_file: set one of them to null")
        if self.host_file is not None and self.pins:
            raise ValueError("a file cannot be pinned: set engine=staged, or host_file to null")
        return self

    @model_validator(mode="after")
    def _programs_need_kernels(self) -> "OffloadConfig":
        if self.programs is not None and self.mode == "resident":
            raise ValueError("programs has no meaning with mode=resident, which transfers no rows: set it to null")
        if self.programs is not None and not (self.engine == "auto" or self.pins):
            raise ValueError(f"programs has no meaning with engine={self.engine}: set one of them to null or auto")
        return self

    @model_validator(mode="after")
    def _link_needs_the_cpu_engine(self) -> "OffloadConfig":
        if self.mode == "resident" and self.emulate_link is not None:
            raise ValueError("emulate_link has no meaning with mode=resident, which transfers no rows: set it to null")
        if self.engine in ENGINES and self.emulate_link is not None:
            raise ValueError(f"emulate_link has no meaning with engine={self.engine}: set one of them to null or auto")
        return self
