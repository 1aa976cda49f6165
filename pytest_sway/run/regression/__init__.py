"""The fixture ``sway_compare``: it opens both sides, has them answer, and reads and writes recorded scores.

`pytest_sway.comparison` computes; this room knows the test, its files and its backends.
"""
