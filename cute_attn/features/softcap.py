"""Softcap: a score s becomes softcap * tanh(s / softcap) (Gemma 2, arXiv:2408.00118)."""

import numbers
from typing import Any

import torch

from .feature import Feature

SOFTCAP_MAX = 1e30


class SoftcapFeature(Feature):
    name, keywords, part, schema = "softcap", ("softcap",), "score", ("float? softcap=None",)

    def given(self, asked):
        return softcap(asked.get("softcap"))

    def arguments(self, value):
        return (value,)


def softcap(value: Any) -> Any:
    if value is None or isinstance(value, torch.SymFloat):
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"softcap: {value!r} came; a positive number is needed, or None for no cap")
    number = float(value)
    if not 1 / SOFTCAP_MAX <= number <= SOFTCAP_MAX:  # also NaN
        raise ValueError(
            f"softcap: {number} came; use one between {1 / SOFTCAP_MAX} and {SOFTCAP_MAX}, or None for no cap"
        )
    return number
