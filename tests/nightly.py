"""Long lists of cases: a fixed sample runs every time, all of them at night (the mark `nightly`)."""

import random
from collections.abc import Iterable
from itertools import product

import pytest


def sample(count: int, *lists: Iterable) -> list:
    """The parameters of every combination of the lists' values, an argument a list; all but `count` are nightly."""
    cases = list(product(*lists))
    assert 0 < count < len(cases), f"{count} of {len(cases)} cases are no sample"
    always = random.Random(0).sample(range(len(cases)), count)
    return [pytest.param(*case, marks=() if i in always else pytest.mark.nightly) for i, case in enumerate(cases)]
