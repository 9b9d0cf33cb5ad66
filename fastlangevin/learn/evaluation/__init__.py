"""Evaluation of samples: metrics, the features they are computed on, and a classifier."""
