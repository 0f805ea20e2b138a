"""Recipes of `unimodal train-tokenizer`, as TOML."""
