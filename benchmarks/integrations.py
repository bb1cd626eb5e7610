"""Times what users of models see: a Llama-7B-shaped prefill, attention with its backward, and what the operator costs.

python benchmarks/integrations.py [--out FILE] [--only WORD]

The model is random, bf16, B=1 and 2,048 tokens; its attention is ours, or torch SDPA's with one backend allowed. The
backward is cuDNN's with ours and with `cudnn`, torch's FlashAttention-2 with `flash`.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from script import main
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from cute_attn import flash_fwd
from cute_attn.integrations import transformers as room
from cute_attn.plan import Problem
from cute_attn.tools.benchmark.frame import Row
from cute_attn.tools.benchmark.implementations import OURS, Prepared, make_inputs, plain
from cute_attn.tools.benchmark.timing import Call
from cute_attn.tools.benchmark.workload import Spec, Workload, cell_word

SDPA = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
TOKENS = 2048
TRAINED = [Problem(8, 16, 16, 2048, 2048, 128, "bf16", "bshd", causal) for causal in (False, True)]
TRAINED += [Problem(8, 32, 32, 2048, 2048, 64, "bf16", "bshd", causal) for causal in (False, True)]


@dataclass(frozen=True)
class Prefill(Spec):
    """A model's layers: the problem is one layer's attention, `weights` are those of all layers' products."""

    weights: int = 0
    layers: int = 0

    def workload(self) -> Workload:
        """Two FLOP and two bytes a weight; attention in each layer."""
        tokens, attention = self.problem.batch * self.problem.seqlen_q, super().workload()
        return Workload(
            2.0 * tokens * self.weights + self.layers * attention.flops,
            2.0 * self.weights + self.layers * attention.bytes,
        )


class Beside:
    """Another implementation's output, for a truth."""

    pairs = ()

    def __init__(self, output: torch.Tensor):
        self._output = output

    def errors(self, o: torch.Tensor) -> tuple[float, float]:
        wrong = o - self._output
        return wrong.abs().max().item(), (wrong.norm() / self._output.norm()).item()


def backed(backend: SDPBackend, run: Callable) -> Call:
    """A call in which torch SDPA may use one backend."""
    return Call(run, context=lambda: sdpa_kernel(backend))


def prefill(tokens: int, device: torch.device, config=None, backends: Mapping[str, SDPBackend] = SDPA) -> list[Row]:
    """A random model's forward; logits are compared with the first backend's."""
    import transformers

    config = config or transformers.LlamaConfig()
    ids = torch.arange(tokens, device=device)[None] * 7 % config.vocab_size
    with device:
        how = dict(attn_implementation=room.register(), dtype=torch.bfloat16)
        model = transformers.AutoModelForCausalLM.from_config(config, **how).eval()

    def call(implementation):
        model.set_attn_implementation(implementation)
        with torch.inference_mode():
            return model(ids, use_cache=False, logits_to_keep=1).logits

    calls = {OURS: Call(partial(call, room.NAME))}
    calls |= {name: backed(backend, partial(call, "sdpa")) for name, backend in backends.items()}
    first = next(iter(backends))
    with calls[first].context():
        truth = Beside(calls[first].run().float())
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    problem = Problem(1, heads, kv, tokens, tokens, config.hidden_size // heads, causal=True)
    weights, layers = sum(w.numel() for w in model.model.layers.parameters()), config.num_hidden_layers
    features = dict(model="Llama-7B-shaped, random", transformers=transformers.__version__)
    spec = Prefill(problem, weights=weights, layers=layers, features=features)
    prepared = {name: partial(Prepared, one, torch.Tensor.float) for name, one in calls.items()}
    return [Row(spec, prepared, truth, "prefill", baseline=first, error_max=0.1)]


def trained(problem: Problem, device: torch.device, backends: Mapping[str, SDPBackend] = SDPA) -> list[Row]:
    """Attention's forward and backward together."""
    q, k, v = (x.detach().requires_grad_() for x in make_inputs(problem, device)[:3])
    grad, causal = torch.randn_like(q), problem.causal

    def step(forward, **how):
        torch.autograd.grad(forward(q, k, v, **how), (q, k, v), grad)

    sdpa = partial(step, scaled_dot_product_attention, is_causal=causal)
    calls = {OURS: plain(partial(step, flash_fwd, causal=causal))}
    calls |= {name: partial(Prepared, backed(backend, sdpa), lambda o: o) for name, backend in backends.items()}
    return [Row(Spec(problem, backward=True), calls, baseline=list(backends)[-1])]


def operator(problem: Problem, device: torch.device) -> list[Row]:
    """Host microseconds of an eager call, directly and by the operator that torch.compile sees."""
    q, k, v = make_inputs(problem, device)[:3]
    op = torch.ops.cute_attn.attention
    calls = {OURS: partial(flash_fwd, q, k, v), "operator": partial(op, q, k, v, False, None, False, "bhsd")}
    prepared = {name: plain(call) for name, call in calls.items()}
    return [Row(Spec(problem), prepared, case="operator", baseline=OURS, host=True)]


GROUPS = {
    "operator": partial(operator, Problem(1, 8, 8, 128, 128, 64)),
    **{f"forward and backward {cell_word(p)}": partial(trained, p) for p in TRAINED},
    "prefill": partial(prefill, TOKENS),
}


if __name__ == "__main__":
    sys.exit(main("integrations", __doc__, GROUPS))
