"""From `pytest_sway.stats.SwayStats` to what a person or a program reads."""
