"""What torch's current streams say about a tensor's GPU, which need not be the current one."""

import torch
from torch import Tensor


def is_captured(x: Tensor) -> bool:
    """Whether a CUDA graph records what is now launched on x, so that nothing can be read from it."""
    if not x.is_cuda:
        return False
    with torch.cuda.device(x.device):  # torch asks the current GPU's stream
        return torch.cuda.is_current_stream_capturing()
