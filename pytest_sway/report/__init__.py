"""What a run reports: its summary, its comparisons, the progress of loads, and the files that it writes."""
