"""Records of rows, their initial values, and their updates."""
