"""d energy / d x for a batch of chains: through autograd, or by explicit passes and kernels."""
