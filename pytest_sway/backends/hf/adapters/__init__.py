"""Puts an adapter on a base, and verifies that it is applied and has an effect."""
