"""`ModelSpec`, which says what to load: its fields, the forms that you can pass, and its cache key."""
