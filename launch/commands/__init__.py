"""The commands of `engram`, one a file; each imports what is heavy only when it runs."""
