"""The fixture ``sway_compare``: opens the views of both sides, scores the questions, reads and writes records.

`pytest_sway.comparison` computes. This room knows the test, its files and its backends.
"""
