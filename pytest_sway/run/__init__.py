"""One pytest run: its options, the order of its tests, its workers, and its checks for leaks and mutations."""
