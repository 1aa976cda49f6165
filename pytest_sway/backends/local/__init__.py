"""A model in this process, whatever computes it: what the kinds ``hf`` and ``mlx`` share."""
