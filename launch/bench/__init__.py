"""Measurements of the tables beside what people use today."""
