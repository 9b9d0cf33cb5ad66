"""Gradients through the chain."""
