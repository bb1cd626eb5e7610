"""Exact attention for NVIDIA Hopper (sm_90a), in CuTe's Python DSL. Importing compiles nothing and needs no GPU."""

from .api import flash_fwd, warmup

__version__ = "0.1.0"
__all__ = ["__version__", "flash_fwd", "warmup"]
