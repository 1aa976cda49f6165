"""Models in this process: what the kinds ``hf`` and ``mlx`` share."""
