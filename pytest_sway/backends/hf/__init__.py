"""Backends of kind ``hf``: Hugging Face models with PEFT adapters.

Importing this package imports neither torch nor transformers nor PEFT; building a backend does.
"""

from pytest_sway.backends.hf.builder import HFBuilder

__all__ = ["HFBuilder"]
