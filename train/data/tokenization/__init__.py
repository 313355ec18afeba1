"""Tokenizers, and where a long text may be cut for them."""
