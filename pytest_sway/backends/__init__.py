"""Backends: a module or room for each kind, and rooms that several kinds share."""
