"""Computes logits from tokens, and scores from logits."""
