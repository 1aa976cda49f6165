"""Backends of kind ``mlx``: models that MLX computes, with LoRA adapters of mlx-lm or PEFT.

Importing this package imports neither mlx nor mlx-lm; building a backend does.
"""

from pytest_sway.backends.mlx.builder import MLXBuilder

__all__ = ["MLXBuilder"]
