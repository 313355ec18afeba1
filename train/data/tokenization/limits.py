"""Bounds of the vocabulary of a byte-level BPE, known before anything that could train one is imported."""

SMALLEST_BPE = 258
"""Without any merge: 256 bytes, end of document, padding."""

LARGEST_BPE = 10_000_000
"""Training takes memory for each entry that is asked for, and ends the process if there is not enough."""
