"""From a spec to a live backend: one module or room per kind, and the rooms that several kinds share."""
