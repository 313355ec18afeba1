"""Finds a job's prefetch settings by measuring it, and tells what a run spends its time on: `engram tune`."""
