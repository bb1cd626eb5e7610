"""The logger "cute_attn": at INFO it says who computes a call in our place, and why, and which kernels are compiled.

logging.basicConfig(); logging.getLogger("cute_attn").setLevel(logging.INFO)
"""

import logging

import torch

logger = logging.getLogger("cute_attn")
CPU = "CPU tensors are computed by torch, in float32"
_said: set[str] = set()


def once(text: str) -> None:
    """Each text once in a process; nothing while torch.compile traces, which has no values to tell of."""
    if torch.compiler.is_compiling() or not logger.isEnabledFor(logging.INFO) or text in _said:
        return
    _said.add(text)
    logger.info(text)
