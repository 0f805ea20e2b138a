"""The vision tokenizer with 16,384 codes that ships with the package (weights, configuration, card)."""
