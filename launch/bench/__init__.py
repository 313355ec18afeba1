"""Measurements: the tables, kernels, links and training steps, beside their alternatives."""
