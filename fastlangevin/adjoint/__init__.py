"""Gradients through the chain, with a choice of what to store and what to recompute."""
