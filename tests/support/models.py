"""Small random models of Hugging Face transformers, with our attention and with their own."""

import inspect

import pytest
import torch
import transformers

from cute_attn import features, reference
from cute_attn.integrations import transformers as room
from cute_attn.problem import Problem

SIZES = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=199,
    max_position_embeddings=512,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=0,
)
CONFIGS = {"llama": transformers.LlamaConfig, "qwen3": transformers.Qwen3Config}


def pair(family, dtype=torch.bfloat16, other="sdpa", **changes):
    """The same random model with our attention and with sdpa's, or another."""
    made = []
    for implementation in (room.register(), other):
        torch.manual_seed(0)
        config = CONFIGS[family](**SIZES | changes)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation, dtype=dtype)
        made.append(model.eval())
    return made


@torch.no_grad()
def logits(model, tokens, **inputs):
    return model(tokens, **inputs).logits.float()


def same_choices(ours, theirs, mine, other, **inputs):
    """Equal tokens; where a sequence first differs, the two choices are as good as equal in sdpa's own logits."""
    for row in range(len(mine)):
        differ = (mine[row] != other[row]).nonzero()
        if len(differ):
            at = int(differ[0])
            mask = inputs.get("attention_mask")
            if mask is not None:
                mask = torch.nn.functional.pad(mask[row : row + 1], (0, at - mask.shape[1]), value=1)
            last = logits(theirs, other[row : row + 1, :at], attention_mask=mask)[0, -1]
            gap = (last[mine[row, at]] - last[other[row, at]]).abs()
            assert gap <= 4 * torch.finfo(ours.dtype).eps * last.abs().max(), f"row {row}, token {at}: gap {gap:.4f}"


MIXED = dict(layer_types=["full_attention", "sliding_attention"], sliding_window=16)
EXPERTS = dict(
    num_experts=4,
    num_local_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=32,
)
FAMILIES = {  # the model's configuration, and the window of each of its two layers
    "llama": ("LlamaConfig", {}, (None, None)),
    "qwen3": ("Qwen3Config", {}, (None, None)),
    "olmo2": ("Olmo2Config", {}, (None, None)),
    "mistral": ("MistralConfig", dict(sliding_window=16), (16, 16)),
    "qwen2": ("Qwen2Config", MIXED | dict(use_sliding_window=True), (None, 16)),
    "gemma2": ("Gemma2Config", MIXED | dict(attn_logit_softcapping=0.5), (None, 16)),
    "gemma3": ("Gemma3TextConfig", MIXED, (None, 16)),
    "exaone4": ("Exaone4Config", MIXED, (None, 16)),
    "olmo3": ("Olmo3Config", MIXED, (None, 16)),
    "cohere2": ("Cohere2Config", MIXED, (None, 16)),
    "qwen2_moe": ("Qwen2MoeConfig", MIXED | EXPERTS | dict(use_sliding_window=True), (None, 16)),
    "phimoe": ("PhimoeConfig", EXPERTS | dict(sliding_window=16), (16, 16)),  # makes the mask, passes no sliding_window
    "olmoe": ("OlmoeConfig", EXPERTS | dict(sliding_window=16), (None, None)),  # passes it, makes no such mask
    "gpt_oss": ("GptOssConfig", MIXED | EXPERTS, (None, 16)),
}
EAGER = ("gemma2", "gpt_oss")  # softcaps and sinks, which sdpa attention has not


def family_pair(family, monkeypatch, dtype=torch.float32, **more):
    """With the same weights, large enough for attention to choose; sinks too."""
    name, changes, _ = FAMILIES[family]
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    monkeypatch.setitem(CONFIGS, family, getattr(transformers, name))
    made = pair(family, dtype, **changes | more, other="eager" if family in EAGER else "sdpa")
    with torch.no_grad():
        for name, x in made[1].named_parameters():
            if name.endswith("sinks"):
                x.normal_(std=2.0)
            elif x.dim() > 1:
                x.mul_(3)
    made[0].load_state_dict(made[1].state_dict())
    return made


def by_definition(q, k, v, *, out=None, **how):
    """flash_fwd in float32, of any type."""
    o, _ = reference.attention(q, k, v, dtype=torch.float32, **with_lists(how, q, k))
    return o if out is None else out.copy_(o)


def with_lists(how, q, k):
    """flash_fwd's options, with lists of blocks as part of mask_mod."""
    how = dict(how)
    given = dict(mask_mod=how.get("mask_mod"), block_mask=how.pop("block_mask", None))
    _, asked = features.collect(False, given)
    if asked.sparse is None:
        return how
    problem = Problem(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3])
    return how | features.reference(features.fitted(asked, problem, q.device))


def needs_lengths():
    from transformers.masking_utils import sdpa_mask

    if "q_length" not in inspect.signature(sdpa_mask).parameters:
        pytest.skip(f"transformers {transformers.__version__} gives cache positions")


def of_bits_alone(mask):
    """Of which nothing is known but the tensor."""
    return type(mask) is room.LazyMask and mask.keys is None


def on_the_gpu(family, monkeypatch):
    """transformers' own model in float32, then ours and theirs in bf16, all of the same weights."""
    more = dict(head_dim=64, num_attention_heads=8, sliding_window=70)
    if FAMILIES[family][2] == (None, None):
        del more["sliding_window"]
    if family == "gpt_oss":
        more |= dict(num_experts_per_tok=4)  # all of them: no near tie decides who is asked
    ours, theirs = (model.cuda() for model in family_pair(family, monkeypatch, torch.bfloat16, **more))
    truth = family_pair(family, monkeypatch, torch.float32, **more)[1].cuda()
    truth.load_state_dict({name: x.float() for name, x in theirs.state_dict().items()})
    return truth, ours, theirs
