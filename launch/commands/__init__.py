"""The commands of `engram`, one per file; each imports what is heavy only when it runs."""
