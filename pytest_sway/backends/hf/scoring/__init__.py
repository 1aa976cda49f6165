"""From tokens to logits, and from logits to numbers and new text."""
