"""Generates text: many prompts at once in rows, or by transformers where a model does not allow that."""
