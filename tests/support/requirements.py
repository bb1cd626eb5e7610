"""What a test needs of the machine."""

import platform

import pytest
import torch

interpreter = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="the host code is loaded by hand, for x86-64 only"
)


def why_no_hopper() -> str:
    if not torch.cuda.is_available():
        return "needs a Hopper GPU (sm_90): torch sees no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    return "" if (major, minor) == (9, 0) else f"needs a Hopper GPU (sm_90): this one is sm_{major}{minor}"
