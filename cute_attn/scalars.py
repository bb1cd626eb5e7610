"""What counts as a whole number in an argument."""

import numbers
from typing import Any

import torch


def integer(value) -> Any:
    """As it is computed with: an int, for NumPy's too, or torch's SymInt; None for anything else, bools among them."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return value
    return int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else None
