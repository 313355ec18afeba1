"""Part `path`: our tables beside what people use today."""
