"""The backbone's optimizers, clipping and schedule."""
