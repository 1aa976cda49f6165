"""Backends of kind ``api``: a base and its tuned self as two models on OpenAI-compatible servers."""
