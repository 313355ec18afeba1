"""Records some training steps, kernel by kernel, as a trace that chrome://tracing and ui.perfetto.dev show."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from train.config.report import ProfileConfig
from train.files import new_file

if TYPE_CHECKING:
    import torch.profiler

TRACE_FILE = "trace.json.gz"
"""Name of the file in a run's folder."""
STEPS_KEY = "engram_steps"
"""Key in the trace's object: how many steps it shows."""


class StepProfiler:
    """Records what the device does, and the calls that give it its work; on a CPU, PyTorch's operations.

    On a GPU the operations themselves are left out: recording them would slow the host down, and show gaps between
    kernels that are not there otherwise.

    Args:
        config: which steps; None for none.
        folder: of the run.
        device: that computes.
    """

    def __init__(self, config: ProfileConfig | None, folder: Path, device: torch.device) -> None:
        self._config, self._folder, self._device = config, folder, device
        self._profile: torch.profiler.profile | None = None
        self._recorded = 0

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around training step `number`, counted from 1.

        Raises:
            OSError: the trace cannot be written.
        """
        config = self._config
        if config is None or not config.first <= number < config.first + config.steps:
            yield
            return
        if self._profile is None:
            self._start()
        yield
        self._recorded += 1
        if number == config.first + config.steps - 1:
            self.close()

    def close(self) -> None:
        """Writes what was recorded, if that has not been done.

        Raises:
            OSError: the trace cannot be written.
        """
        profile, self._profile = self._profile, None
        if profile is None:
            return
        self._finish_work()
        profile.add_metadata_json(STEPS_KEY, str(self._recorded))
        profile.stop()
        with new_file(self._folder / TRACE_FILE) as partial:
            profile.export_chrome_trace(str(partial))  # gzipped, as its name says so

    def _start(self) -> None:
        # Imported here: it takes a while, and few runs need it.
        from torch.profiler import ProfilerActivity, profile

        self._finish_work()
        activity = ProfilerActivity.CUDA if self._device.type == "cuda" else ProfilerActivity.CPU
        self._profile = profile(activities=[activity])
        self._profile.start()

    def _finish_work(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
