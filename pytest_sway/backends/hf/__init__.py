"""Backends of kind ``hf``: Hugging Face models and PEFT adapters. All imports of torch are here, inside functions."""
