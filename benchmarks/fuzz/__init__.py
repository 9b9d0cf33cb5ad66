"""Random cases of the step and of energies, each compared with an evaluation in float64."""
