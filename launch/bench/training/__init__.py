"""Part `train`: runs of a job, step by step."""
