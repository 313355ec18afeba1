"""Counts what a job takes, before anything is built."""
