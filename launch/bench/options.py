"""What a user may choose, and the settings of the tables that follow from it."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

from pydantic import ValidationError

from launch.bench.optimizers import OPTIMIZERS
from launch.bench.workload import DrawnSteps, Workload
from offload.config import LinkConfig, OffloadConfig, TableOptimizerConfig
from train.errors import UserError


@dataclass(frozen=True)
class BenchOptions:
    """How to measure.

    Attributes:
        workload: what is looked up.
        steps, warmup: timed steps, and those before them that are not counted.
        optimizer: a key of `launch.bench.optimizers.OPTIMIZERS`.
        mode: of our tables: `window` over host memory, or `resident`, the whole table where the model computes.
        depth: look-ahead.
        window_rows: slots; None for what the depth needs and two more steps' rows.
        host_file: folder for the tables' file in part `disk`; None for that of temporary files.
        threads: of PyTorch, all ranks together.
        plain_allocator: measure under glibc's defaults, not under the settings that a rank without a GPU runs with.
        compute_ms: duration of what stands for the model's computation, where there is such a thing.
        job, overrides: the job that part `train` trains.
        depths: look-aheads of part `train`, in the order of their turns.
        engines: of part `train`: each for one run with rows in host memory.
        rounds: turns of each depth in part `train`, and of all in parts `checkpoint` and `data`.
        table_mib: MiB of the table in part `checkpoint`.
        folder: an empty one, where parts `checkpoint` and `data` write.
        text_mb: MB of text in part `data`.
        run: whose loader part `data` measures; None for none.
        device: `cpu` or `cuda`: where the model would compute.
        seconds: the time that parts `kernels`, `links` and `train` may take; they leave out what does not fit. None for
            no limit.
        tokens: of a step, in parts `kernels` and `links`; None for as many as suit the device.
        memory_mib: of host memory that part `links` reaches into; None for as much as suits the device.
        programs: of the kernels in part `links`, on a GPU, each number in turn; none for the usual ones.
        record_bytes: sizes of records in part `links`, multiples of 4; none for the usual ones.
        traces: folder for a trace of each run of part `train`; None for none.
        partial: file in which part `train` keeps what it found so far; None for none.
    """

    workload: Workload = field(default_factory=Workload)
    steps: int = 20
    warmup: int = 5
    optimizer: str = "adam"
    mode: Literal["window", "resident"] = "window"
    depth: int = 1
    window_rows: int | None = None
    host_file: str | None = None
    threads: int = 1
    plain_allocator: bool = False
    compute_ms: float = 100.0
    job: str = "configs/tiny.yaml"
    overrides: tuple[str, ...] = ()
    depths: tuple[int, ...] = (2, 1, 4, 0)
    engines: tuple[str, ...] = ("auto",)
    rounds: int = 1
    table_mib: int = 2048
    folder: str = ""
    text_mb: int = 32
    run: str | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    seconds: float | None = None
    tokens: int | None = None
    memory_mib: int | None = None
    programs: tuple[int, ...] = ()
    record_bytes: tuple[int, ...] = ()
    traces: str | None = None
    partial: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The options as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Self:
        """The inverse of `to_json`."""
        return cls(**saved | {"workload": Workload(**saved["workload"])})

    @property
    def total_steps(self) -> int:
        """Steps that are taken."""
        return self.warmup + self.steps

    @property
    def table_optimizer(self) -> TableOptimizerConfig:
        """The `offload.optimizer` section."""
        return TableOptimizerConfig(**OPTIMIZERS[self.optimizer])

    def draw(self, workload: Workload | None = None) -> DrawnSteps:
        """The ids of all steps."""
        return DrawnSteps(workload or self.workload, self.total_steps)

    def offload(
        self,
        drawn: DrawnSteps,
        *,
        depth: int | None = None,
        window_depth: int | None = None,
        link: LinkConfig | None = None,
    ) -> OffloadConfig:
        """The `offload` section for these steps; by default the window is made for `window_depth`, else `depth`.

        Raises:
            UserError: the options exclude each other.
        """
        depth = self.depth if depth is None else depth
        deepest = depth if window_depth is None else window_depth
        try:
            return OffloadConfig(
                mode=self.mode,
                depth=depth,
                window_rows=self.window_rows or (deepest + 3) * drawn.most_unique,
                # An emulated link is for the CPU.
                engine="cpu" if self.device == "cpu" or link is not None else "auto",
                # As late in a run: the table's pages exist, no step pays for their first use.
                host_touch=True if self.host_file is None else None,
                host_file=self.host_file,
                emulate_link=link,
                optimizer=self.table_optimizer,
            )
        except ValidationError as error:
            raise UserError(f"offload: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
