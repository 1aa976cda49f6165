"""One loaded base, and what is bound to it."""
