"""Long lists of cases: a fixed sample runs every time, all of them at night (the mark `nightly`)."""

import random
from collections.abc import Callable, Iterable
from itertools import product

import pytest

HEAD_DIM_OF_EACH_CLASS = (64, 128, 256)  # tiles that four, three and two warpgroups multiply


def sample(count: int, *lists: Iterable) -> list:
    """The parameters of every combination of the lists' values, an argument a list; all but `count` are nightly."""
    cases = list(product(*lists))
    assert 0 < count < len(cases), f"{count} of {len(cases)} cases are no sample"
    always = random.Random(0).sample(range(len(cases)), count)
    return [pytest.param(*case, marks=() if i in always else pytest.mark.nightly) for i, case in enumerate(cases)]


def where(every_time: Callable[..., bool], cases: Iterable) -> list:
    """The parameters of all cases of one argument; those for which it does not hold are nightly."""
    return [pytest.param(case, marks=() if every_time(case) else pytest.mark.nightly) for case in cases]
