"""softcap, alibi_slopes and sinks that a few units of scores feel."""

import torch

NAMES = ("softcap", "alibi_slopes", "sinks")


def score_features(batch, heads, device, asked=(True, True, True), per_batch=True):
    """A softcap that scores of a few units feel, slopes of both signs, and sinks from negligible to dominant."""
    slopes = torch.randn((batch, heads) if per_batch else (heads,), device=device) / 8
    values = 1.5, slopes, torch.linspace(-30, 12, heads, device=device)
    return {name: x for name, x, wanted in zip(NAMES, values, asked, strict=True) if wanted}
