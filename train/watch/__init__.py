"""What watches over a run beside its loop: signals that ask it to end, and whether its ranks make progress."""
