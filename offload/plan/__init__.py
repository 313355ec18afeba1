"""What a step will need, worked out ahead: rows, owners, exchanges."""
