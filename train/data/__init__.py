"""Text to token stores to batches: sources, tokenizers, the store and its preparation, packing, the loader.

Only `loader` and `packing` need torch: preparing starts worker processes that import the rest.
"""
