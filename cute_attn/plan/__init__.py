"""Problem -> FwdConfig: which kernel runs. Needs no GPU.

A problem starts from a kernel of the tuned table (`candidates`). The rules of `features` and `pack_gqa`, a list in one
order, make of it what was asked for; after each of them the kernel gets the exceptions of the compiler's
(`exceptions.json`) that it needs. `explain(problem)` names what applied. `prebuilt_set` lists kernels to compile ahead.
"""

from ..problem import PLAIN as PLAIN
from ..problem import FeatureKey as FeatureKey
from ..problem import Problem as Problem
from .candidates import EQUAL_HEAD_DIMS as EQUAL_HEAD_DIMS
from .candidates import EVERY_HEAD_DIM as EVERY_HEAD_DIM
from .candidates import HEAD_DIMS as HEAD_DIMS
from .candidates import config as config
from .candidates import kernel_dims as kernel_dims
from .features import constant_time as constant_time
from .features import with_features as with_features
from .planner import RULES as RULES
from .planner import explain as explain
from .planner import kvcache as kvcache
from .planner import plan as plan
from .planner import varlen as varlen
from .prebuilt_set import PREBUILT_FEATURES as PREBUILT_FEATURES
from .prebuilt_set import KernelClass as KernelClass
from .prebuilt_set import kernel_class as kernel_class
from .prebuilt_set import prebuilt as prebuilt
from .prebuilt_set import prebuilt_kvcache as prebuilt_kvcache
from .prebuilt_set import prebuilt_varlen as prebuilt_varlen
from .rule import Rule as Rule
from .rule import Step as Step
from .rule import changes as changes
