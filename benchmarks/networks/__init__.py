"""Energies in the manner of public code, and a benchmark of a step of a chain on each of them."""
