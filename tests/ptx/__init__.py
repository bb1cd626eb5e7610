"""Runs the kernels' PTX without a GPU."""

from .device import Compiled, compiled, get, interpreted
from .machine import Deadlock, Machine
from .memory import Fault

__all__ = ["Compiled", "Deadlock", "Fault", "Machine", "compiled", "get", "interpreted"]
