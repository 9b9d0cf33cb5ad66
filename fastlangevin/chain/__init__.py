"""The chain of one call: its values, its loop, Metropolis adjustment and CUDA graphs."""
