"""What an instruction gives where a warp cannot go on."""

from collections.abc import Callable
from typing import NamedTuple


class Wait(NamedTuple):
    over: Callable[[], bool]
    told: Callable[[], str]  # for whoever reads of a deadlock


def for_lanes(what: str) -> Wait:
    """For lanes that are elsewhere: it ends as they go on."""
    return Wait(lambda: False, lambda: f"{what} waits for the other lanes")
