"""The network: plain torch modules that take memory rows as tensors and do not know where they come from."""
