"""Backends of kind ``dummy``: canned answers and no model."""
