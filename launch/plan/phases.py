"""A job's phases as jobs of their own: what one takes in memory and time, its steps' length and mixture decide."""

from train.config.job import JobConfig
from train.data.phases import begun_at, spans


def phase_jobs(job: JobConfig) -> list[JobConfig]:
    """For each phase that the job's steps come to, a job of its steps alone; the job itself where there is one."""
    batch = job.train.global_batch_size
    if not job.data.phases:
        return [job]
    found = []
    for begin, (steps, length) in zip(begun_at(job.data, batch), spans(job.data, batch, job.train.steps), strict=False):
        text = {"mix": begin.mix, "path": None} if begin.mix else {}
        data = job.data.model_copy(update={"sequence_length": length, "phases": [], **text})
        train = job.train.model_copy(update={"steps": steps})
        found.append(job.model_copy(update={"data": data, "train": train}))
    return found


def largest(jobs: list[JobConfig]) -> JobConfig:
    """The phase of the longest sequences, which the machines must have room for."""
    return max(jobs, key=lambda job: job.data.sequence_length)
