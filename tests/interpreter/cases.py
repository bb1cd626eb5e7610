"""One launch of any config that needs no function of a user's, at tiny sizes, against float64."""

import torch

from cute_attn.kernels.config import FwdConfig
from tests.support.attention import check, inputs
from tests.support.varlen import check as check_varlen
from tests.support.varlen import varlen_inputs

from .device import NUM_SMS, interpreted

SEQUENCES = ((1, 1), (0, 0), (65, 63), (0, 17), (33, 0), (70, 130))  # queries and keys of varlen sequences
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def run(config: FwdConfig, seqlen_q=113, seqlen_k=203, *, batch=1, heads_kv=1, seed=0, num_sms=NUM_SMS, **how):
    """Raises where it is wrong. Varlen sequences have lengths of their own; how: more of the call's arguments."""
    with interpreted(config, seed=seed, num_sms=max(num_sms, config.cluster_size)) as launched:
        if config.varlen:
            mask = {name: value for name, value in asked(config).items() if name in ("causal", "window")}
            dtype = DTYPES[config.dtype]
            check_varlen(
                *varlen_inputs(SEQUENCES, 2, 1, config.head_dim, dtype, where="cpu", slack=2 * (seed % 2)), **mask
            )
        else:
            heads = heads_kv * (config.pack if config.pack > 1 else 2)
            sizes = batch, heads, heads_kv, seqlen_q, seqlen_k, config.head_dim
            how_made = dict(dtype=DTYPES[config.dtype], layout=config.layout, head_dim_v=config.head_dim_v or None)
            tensors = inputs(*sizes, device="cpu", **how_made)
            check(*tensors, **asked(config, heads) | how)
    assert launched == [config]


def asked(config: FwdConfig, heads: int = 2) -> dict:
    """The arguments of a call that its kernel is for."""
    mask, score = config.mask, config.score.name
    features = {
        "window": (40, 10) if mask.windowed else None,
        "softcap": 5.0 if "softcap" in score else None,
        "alibi_slopes": torch.linspace(0.01, 0.5, heads) if "alibi" in score else None,
        "sinks": torch.linspace(-1, 2, heads) if config.sinks else None,
    }
    how = dict(causal=mask.causal and not mask.windowed, layout=config.layout, constant_time=config.constant_time)
    return how | {name: value for name, value in features.items() if value is not None}
