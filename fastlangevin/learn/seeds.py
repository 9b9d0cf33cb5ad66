"""The numbers that are folded into a run's seed: ``noise.fold_in(seed, number)`` is a seed.

Numbers below 2**32 are iterations: the seed of the chains of each.
"""

WEIGHTS = 2**32  # the first weights of the energy
BUFFER = 2**32 + 1  # the persistent chains
GRID = 2**32 + 2  # the samples that a run shows
SWEEP = 2**32 + 3  # the samples that a sweep measures
PART = 2**40  # + first chain: dropout in a part of the batch other than the first
ITEMS = 2**41  # + iteration: the transforms of a data set's items
