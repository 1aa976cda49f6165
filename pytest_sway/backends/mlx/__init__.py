"""Backends of kind ``mlx``: models that MLX runs, with LoRA adapters of mlx-lm or PEFT."""
