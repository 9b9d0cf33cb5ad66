"""One call's chain: its values, its loop, and its captured graphs."""
