"""One loaded base, its arrays, and what computes with them."""
