"""Serves the tests of a run with backends. A run without a request does not import this room."""
