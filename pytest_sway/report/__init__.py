"""From `pytest_sway.cache.stats` to what a person reads."""
