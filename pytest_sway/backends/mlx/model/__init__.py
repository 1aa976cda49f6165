"""A loaded base, its arrays, and the engine that computes with them."""
