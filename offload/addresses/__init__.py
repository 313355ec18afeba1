"""From token ids to rows: the compressed vocabulary, and the hash."""
