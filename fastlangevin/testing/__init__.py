"""Is it the same chain? A loop and what replaces it, run with the same noise, step by step."""

from fastlangevin.testing.comparison import Comparison, compare

__all__ = ["Comparison", "compare"]
