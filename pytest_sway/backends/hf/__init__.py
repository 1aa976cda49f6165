"""Backends of kind ``hf``: Hugging Face models with PEFT adapters. Only it imports torch, and only in functions."""
