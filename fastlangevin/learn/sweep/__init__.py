"""Sweeps: many training runs over lists of settings and seeds."""
