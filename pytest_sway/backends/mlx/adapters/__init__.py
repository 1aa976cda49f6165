"""Adapters of mlx-lm or PEFT: read, converted, put on a base, and verified."""
