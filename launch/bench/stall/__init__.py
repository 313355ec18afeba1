"""Parts `stall` and `disk`: waiting for rows, by look-ahead."""
