"""Text to token stores to batches: sources, tokenizers, stores and their preparation, packing, the loader.

Only the loader needs torch: preparing starts worker processes that import the rest.
"""
