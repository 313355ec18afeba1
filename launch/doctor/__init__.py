"""What a machine, or all hosts of a job, have and lack for training: `engram doctor`."""
