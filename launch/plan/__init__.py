"""Counts what a job takes before it is built; of the job only plans of a few steps are made, and timed."""
