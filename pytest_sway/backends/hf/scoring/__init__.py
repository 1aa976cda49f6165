"""Computes logits from tokens, and scores and new text from logits."""
