"""The shipped vision tokenizer with 16,384 codes (weights, configuration, card)."""
