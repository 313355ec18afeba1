"""Folders of Hugging Face's transformers, out and in: names, configs, and the code that exports carry with them."""
