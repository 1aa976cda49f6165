"""Detects shared state that a test has changed, and memory that a close did not free."""
