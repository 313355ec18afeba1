"""Configuration, data, the loop, schedules, checkpoints, metrics, evaluation: joins model and tables."""
