"""What is refused before a job's ranks start: they would import PyTorch for seconds, and then report the same."""

from train.config.job import JobConfig
from train.data.remote.files import is_url
from train.data.stores.located import located
from train.errors import UserError


def refuse(job: JobConfig, gpus: int) -> None:
    """Checks what a start on this machine cannot do without.

    Raises:
        UserError: no data at `data.path`, or a planner on GPUs where there are none.
    """
    for path in (job.data.path, *(source.path for mix in job.data.mixes for source in mix)):
        if path is not None and not is_url(path):
            located(path)
    if job.offload.planner == "device" and job.model.engram and not gpus:
        raise UserError("offload.planner=device needs a GPU, and ranks run on the CPU here: set it to auto")
