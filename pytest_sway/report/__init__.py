"""The lines that a run prints: its summary, its comparisons and the progress of loads."""
