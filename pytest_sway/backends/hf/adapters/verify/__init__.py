"""Checks that an adapter is loaded in full, that it has an effect, and that a fine-tuned model has one."""
