"""Part `checkpoint`: saves and loads beside what a disk does without us."""
