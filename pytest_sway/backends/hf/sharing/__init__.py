"""Many models over the same memory: trees of objects, and copies of what is written to."""
