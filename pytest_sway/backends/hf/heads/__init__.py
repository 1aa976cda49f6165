"""Heads other than a causal language model's: a module for each, with the questions that it answers."""
