"""Deals tests to the workers of pytest-xdist: ``-n`` without ``--dist``."""
