"""Texts to tokens, as in lm-evaluation-harness; without torch, for every kind that tokenises."""
