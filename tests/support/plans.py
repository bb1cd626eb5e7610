"""The kernels that calls of a kind may get."""

from cute_attn import checks, device, plan
from cute_attn.plan import Problem


def kernels_of(head_dim, causal, dtype):
    """Whatever the size of the problem."""
    problem = Problem(1, 1, 1, 1, 1, head_dim, checks.DTYPES[dtype], "bhsd", causal)
    one = plan.kind(plan.plan(problem))
    return [config for config in plan.shipped(device.name()) if plan.kind(config) == one]
