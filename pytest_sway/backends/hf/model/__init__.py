"""A loaded base, and the models that are bound to it."""
