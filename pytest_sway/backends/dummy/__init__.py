"""Backends of kind ``dummy``: canned answers instead of a model."""
