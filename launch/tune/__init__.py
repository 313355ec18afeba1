"""Finds a job's look-ahead, window and engine by measuring it; what a run spends its time on: `engram tune`."""
