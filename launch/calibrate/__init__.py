"""Measures this machine's numbers as `launch/plan/hardware.yaml` has them for GPUs: `engram plan --calibrate`."""
