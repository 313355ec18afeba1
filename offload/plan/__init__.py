"""What a step will need, computed ahead: rows, owners, exchanges."""
