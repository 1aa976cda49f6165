"""Backends of kind ``api``: a base and a fine-tuned model on OpenAI-compatible servers."""
