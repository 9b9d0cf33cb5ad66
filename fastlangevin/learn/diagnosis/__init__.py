"""Diagnosis of a learned energy: its learning, its moments and its chains."""
