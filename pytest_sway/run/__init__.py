"""One pytest run: its options, the order of its tests, its workers, and who is to blame for leaks and mutations."""
