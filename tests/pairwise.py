"""Pairwise samples of products of options: few cases in which every two values meet."""

import itertools
from collections.abc import Iterable
from typing import Any


def pairwise(*axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Cases with one value per axis such that any two values of two axes meet in one of them.

    Most faults of options come from one value, or from two together. The full product covers no
    more of those pairs, and has many times as many cases. The sample is greedy, and the same in
    every process.
    """
    values = [list(axis) for axis in axes]
    columns = list(itertools.combinations(range(len(values)), 2))
    products = list(itertools.product(*(range(len(axis)) for axis in values)))

    def pairs(case: tuple[int, ...]) -> set[tuple[int, int, int, int]]:
        return {(i, j, case[i], case[j]) for i, j in columns}

    missing = set().union(*map(pairs, products))
    cases = []
    while missing:
        case = max(products, key=lambda case: len(pairs(case) & missing))
        missing -= pairs(case)
        cases.append(tuple(axis[i] for axis, i in zip(values, case, strict=True)))
    return cases
