"""Lets many models share one memory: trees of new objects, with copies of what is written to."""
