"""Packaged files: the tiny model and its tokenizer."""
