"""Backends of kind ``mlx``: models that MLX computes, with LoRA adapters of mlx-lm or PEFT."""
