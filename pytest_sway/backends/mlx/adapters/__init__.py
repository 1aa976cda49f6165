"""Read, convert, attach and verify adapters of mlx-lm or PEFT."""
