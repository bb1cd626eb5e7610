"""Runs the kernels without a GPU: an interpreter, in Python, of the PTX that the DSL makes of them.

    from tests.interpreter import interpreted
    with interpreted():                       # CPU tensors are a GPU's: the whole real path of a call
        flash_fwd(q, k, v, causal=True)
    with interpreted(config, num_sms=2, seed=1):  # this FwdConfig, whatever the plan says
        flash_fwd(q, k, v)
    cases.run(config, 113, 203, seed=1)       # the like, on random tensors, against float64
    kernel = compiled(lambda options: cute.compile(function, *arguments, options=f"{options} --enable-tvm-ffi ..."))
    kernel(*arguments)                        # any other function of the DSL, on CPU tensors

`python -m tests.interpreter NAME ...` does so for every prebuilt kernel of such a name, some ten seconds each.
`kernel.kernels[name].never_ran()` has the instructions that no launch of a kernel has come to.

What runs: the host code that was compiled, in this process (`elf`, `host`), so grid, strides and TMA descriptors are
the real ones; then each warp of each CTA (`machine`), 32 lanes at a time with NumPy (`translate`, `alu`, `memory`,
`sync`, `tensor_core`, `tma`). Which warp goes on, when a TMA transfer arrives, and when a WGMMA reads its operands are
chances of a seed. An instruction, or a part of one, that is not known raises NotImplementedError: none is passed over.

What is found, as a `Fault`, a `Deadlock` with where each warp waits, or a wrong result:
    - accesses beyond the tensors that the launch got, beyond shared memory, or not aligned; a box of TMA too
    - shared memory, registers and accumulators in flight that are read before they are written: they are poisoned, NaN
    - waits that are missing, of a wrong phase or for too many; mbarriers not initialised, or arrived at too often
    - what one warp overtakes: places of a ring that are freed too early or too late
    - a CTA that is reached by its cluster, or still read by TMA, when it has ended
    - stores to shared memory that TMA or WGMMA reads without fence.proxy.async
    - global memory that is touched before griddepcontrol.wait, but what a call's later launches read of its inputs

What is not modelled: time, caches and their hints, and the machine code: what ptxas makes of PTX is not seen. Warps see
each other's stores at once, in the order of the program, so a missing memory fence does not show, nor one of WGMMA. Two
warps that write one place are not told apart from one. setmaxnreg's registers are not counted. Launches follow each
other. Arithmetic is IEEE's, with NumPy's exp2, log2, tanh and reciprocal in place of the GPU's approximations, and
float32 sums of a WGMMA's products in an order of their own: results are close to a GPU's, not the same bits.
"""

from .device import Compiled, compiled, get, interpreted
from .machine import Deadlock, Machine
from .memory import Fault

__all__ = ["Compiled", "Deadlock", "Fault", "Machine", "compiled", "get", "interpreted"]
