"""The tables: addresses, host shards, planning, the resident window, transfers, exchange, row optimizers."""
