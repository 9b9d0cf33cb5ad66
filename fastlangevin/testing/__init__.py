"""Compare a sampling loop with its replacement, step by step, on the same noise."""

from fastlangevin.testing.comparison import Comparison, compare

__all__ = ["Comparison", "compare"]
