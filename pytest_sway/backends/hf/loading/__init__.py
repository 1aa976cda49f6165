"""Loads models from files into memory."""
