"""Times what users of models see: a Llama-7B-shaped prefill, attention with its backward, and what the operator costs.

python benchmarks/integrations.py [--out FILE]

The model is random, bf16, B=1 and 2,048 tokens; its attention is ours, or torch SDPA's with one backend allowed. The
backward is cuDNN's with ours and with `cudnn`, torch's FlashAttention-2 with `flash`.
"""

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from gpu_tests import where
from script import record_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from cute_attn import flash_fwd
from cute_attn.integrations import torch_op  # noqa: F401  registers the operator
from cute_attn.integrations import transformers as room
from cute_attn.plan import Problem
from cute_attn.tools.benchmark.implementations import OURS, make_inputs
from cute_attn.tools.benchmark.report import write_json
from cute_attn.tools.benchmark.timing import METHOD, Call, CudaTimer, Timer, compare, host_us

SDPA = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
TOKENS = 2048
TRAINED = [Problem(8, 16, 16, 2048, 2048, 128, "bf16", "bshd", causal) for causal in (False, True)]
TRAINED += [Problem(8, 32, 32, 2048, 2048, 64, "bf16", "bshd", causal) for causal in (False, True)]

Entry = dict[str, Any]


def only(backend: SDPBackend | None):
    """A context in which torch SDPA may use one backend; none: ours, which needs none."""
    return nullcontext if backend is None else lambda: sdpa_kernel(backend)


def prefill(config, tokens: int, device: torch.device, timer: Timer, backends=SDPA) -> list[Entry]:
    """Tokens a second of a random model's forward; the error of its last logits beside the first backend's."""
    from transformers import AutoModelForCausalLM

    ids = torch.arange(tokens, device=device)[None] * 7 % config.vocab_size
    with device:
        model = AutoModelForCausalLM.from_config(config, attn_implementation=room.register(), dtype=torch.bfloat16)
    model.eval()
    calls, logits = {}, {}

    def call(implementation):
        model.set_attn_implementation(implementation)
        with torch.inference_mode():
            return model(ids, use_cache=False, logits_to_keep=1).logits

    for name, backend in {OURS: None, **backends}.items():
        implementation = room.NAME if backend is None else "sdpa"
        calls[name] = Call(lambda implementation=implementation: call(implementation), context=only(backend))
        with calls[name].context():
            logits[name] = calls[name].run().float()
    first = logits[next(iter(backends))]
    stats = compare(calls, timer=timer)
    return [
        dict(
            contender=name,
            ms=one.p50_us / 1000,
            tokens_per_s=1e6 * tokens / one.p50_us,
            spread=one.spread,
            logits_off=((logits[name] - first).norm() / first.norm()).item(),
        )
        for name, one in stats.items()
    ]


def trained(problem: Problem, device: torch.device, timer: Timer, backends=SDPA) -> list[Entry]:
    """Microseconds of attention's forward and backward together."""
    q, k, v = (x.detach().requires_grad_() for x in make_inputs(problem, device)[:3])
    grad, causal = torch.randn_like(q), problem.causal

    def step(forward):
        torch.autograd.grad(forward(q, k, v), (q, k, v), grad)

    def ours(q, k, v):
        return flash_fwd(q, k, v, causal=causal)

    def theirs(q, k, v):
        return scaled_dot_product_attention(q, k, v, is_causal=causal)

    calls = {OURS: Call(lambda: step(ours))}
    calls |= {name: Call(lambda: step(theirs), context=only(backend)) for name, backend in backends.items()}
    stats = compare(calls, timer=timer)
    shape = f"{problem.batch},{problem.heads},{problem.seqlen_q},{problem.head_dim}"
    return [dict(shape=shape, causal=causal, contender=n, us=s.p50_us, spread=s.spread) for n, s in stats.items()]


def operator(device: torch.device, timer: Timer) -> Entry:
    """Host microseconds of an eager call, directly and by the operator that torch.compile sees."""
    q, k, v = make_inputs(Problem(1, 8, 8, 128, 128, 64), device)[:3]
    op = torch.ops.cute_attn.flash_fwd
    calls = {"flash_fwd": lambda: flash_fwd(q, k, v), "operator": lambda: op(q, k, v, False, None, "bhsd", False)}
    return {name: host_us(Call(call), 10.0, timer) for name, call in calls.items()}


def main(argv: Sequence[str] | None = None) -> int:
    out = record_of("integrations", __doc__, argv)
    import transformers

    device, timer = torch.device("cuda"), CudaTimer()
    record = {
        **where(),
        "transformers": transformers.__version__,
        "method": METHOD,
        "operator_host_us": operator(device, timer),
        "forward_and_backward": [entry for problem in TRAINED for entry in trained(problem, device, timer)],
        "prefill": dict(
            model=f"Llama-7B-shaped, random, bf16, B=1, {TOKENS} tokens",
            contenders=prefill(transformers.LlamaConfig(), TOKENS, device, timer),
        ),
    }
    write_json(out, record)
    for part in ("operator_host_us", "forward_and_backward", "prefill"):
        print(part, record[part], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
