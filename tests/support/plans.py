"""The kernels that calls of a kind may get."""

from cute_attn import checks, device, plan
from cute_attn.plan import Problem


def kernels_of(head_dim, causal, dtype):
    """Whatever the size of the problem."""
    problem = Problem(1, 1, 1, 1, 1, head_dim, checks.DTYPES[dtype], "bhsd", causal)
    one = plan.kernel_class(plan.plan(problem))
    return [config for config in plan.prebuilt(device.name()) if plan.kernel_class(config) == one]
