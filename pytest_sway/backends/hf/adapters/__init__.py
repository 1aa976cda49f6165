"""Putting an adapter on a base, and making sure that it is there and does something."""
