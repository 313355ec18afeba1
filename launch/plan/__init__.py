"""Counting what a job comes to, before anything is built."""
