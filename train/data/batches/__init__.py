"""From token stores to batches: packing, the order of an epoch, mixtures, and the loader."""
