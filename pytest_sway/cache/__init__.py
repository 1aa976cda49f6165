"""Who may hold which backend, and for how long. Knows no pytest and no torch."""
