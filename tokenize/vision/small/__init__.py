"""The small vision tokenizer that ships with the package (weights, configuration, card)."""
