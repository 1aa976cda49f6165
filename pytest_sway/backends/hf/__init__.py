"""Backends of kind ``hf``: Hugging Face models with PEFT adapters. Here alone torch is imported, inside functions."""
