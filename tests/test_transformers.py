"""Models of Hugging Face transformers from small random configurations, on the CPU, beside their own sdpa attention."""

import pytest
import torch

from cute_attn import api
from cute_attn.integrations import transformers as room

transformers = pytest.importorskip("transformers", reason='transformers is missing: pip install "cute_attn[test]"')

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
families = pytest.mark.parametrize("family", CONFIGS)
PROMPT = torch.arange(2 * 37).reshape(2, 37) * 7 % 198 + 1
PADDED = torch.ones_like(PROMPT)
PADDED[0, :11] = 0


def pair(family, dtype=torch.bfloat16, **changes):
    """The same random model with our attention and with sdpa's."""
    made = []
    for implementation in (room.register(), "sdpa"):
        torch.manual_seed(0)
        config = CONFIGS[family](**SIZES | changes)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation, dtype=dtype)
        made.append(model.eval())
    return made


windows = []  # of those calls


@pytest.fixture
def calls(monkeypatch):
    """(Sq, Sk, causal) of each call that reaches us."""
    seen, flash_fwd = [], api.flash_fwd
    windows.clear()

    def count(q, k, v, **options):
        seen.append((q.shape[2], k.shape[2], options["causal"]))
        windows.append(options.get("window"))
        return flash_fwd(q, k, v, **options)

    monkeypatch.setattr(api, "flash_fwd", count)
    return seen


@torch.no_grad()
def logits(model, tokens, **inputs):
    return model(tokens, **inputs).logits.float()


@families
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_prefill(family, dtype, calls):
    """No worse than twice sdpa, both against the same weights in float32."""
    ours, theirs = pair(family, dtype)
    reference = pair(family, torch.float32)[1]
    reference.load_state_dict({name: x.float() for name, x in theirs.state_dict().items()})
    want, mine, other = logits(reference, PROMPT), logits(ours, PROMPT), logits(theirs, PROMPT)
    assert calls == [(37, 37, True)] * 2
    ulp = torch.finfo(dtype).eps * want.abs().max()
    assert (mine - want).abs().max() <= 2 * (other - want).abs().max() + ulp


def generate(model, tokens, **how):
    return model.generate(tokens, do_sample=False, min_new_tokens=256, max_new_tokens=256, **how)


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


@families
def test_generation_with_a_growing_cache(family, calls):
    ours, theirs = pair(family)
    mine, other = generate(ours, PROMPT), generate(theirs, PROMPT)
    same_choices(ours, theirs, mine, other)
    assert calls[:2] == [(37, 37, True)] * 2
    assert calls[2:] == [(1, n, False) for n in range(38, 37 + 256) for _ in range(2)]


@families
def test_generation_with_a_static_cache(family, calls):
    """Its prefill is ours, on the part of the cache that is filled; decoding comes with a mask, and is sdpa's."""
    ours, theirs = pair(family)
    how = dict(cache_implementation="static", disable_compile=True)
    same_choices(ours, theirs, generate(ours, PROMPT, **how), generate(theirs, PROMPT, **how))
    assert calls == [(37, 37, True)] * 2


@families
def test_left_padding_is_sdpas(family, calls):
    ours, theirs = pair(family)
    mine, other = (generate(model, PROMPT, attention_mask=PADDED) for model in (ours, theirs))
    assert torch.equal(mine, other) and not calls


def test_chunks_of_a_prompt(calls):
    """The second chunk's mask is not ours; what both say together is what one pass says."""
    ours, _ = pair("llama")
    cache = transformers.DynamicCache()
    chunks = [logits(ours, PROMPT[:, part], past_key_values=cache) for part in (slice(0, 20), slice(20, 37))]
    assert calls == [(20, 20, True)] * 2
    torch.testing.assert_close(torch.cat(chunks, 1), logits(ours, PROMPT), atol=0.02, rtol=0.05)


@pytest.mark.parametrize("changes", [dict(head_dim=20), dict(head_dim=264)], ids=str)
def test_other_head_dims_are_sdpas(changes, calls):
    ours, theirs = pair("llama", **changes)
    assert torch.equal(logits(ours, PROMPT), logits(theirs, PROMPT)) and not calls


def weight_gradients(model, **changes):
    model.zero_grad()
    model.train()(PROMPT, labels=PROMPT, **changes).loss.backward()
    return torch.cat([x.grad.flatten() for x in model.parameters()]).float()


@families
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training(family, checkpointing, calls):
    """Every weight's gradient, no worse than twice sdpa's; the backward of a checkpoint calls anew."""
    ours, theirs = pair(family)
    reference = pair(family, torch.float32)[1]
    reference.load_state_dict({name: x.float() for name, x in theirs.state_dict().items()})
    if checkpointing:
        ours.gradient_checkpointing_enable()
    want, mine, other = (weight_gradients(model) for model in (reference, ours, theirs))
    assert calls == [(37, 37, True)] * (8 if checkpointing else 4)  # each once more, by the operator
    assert (mine - want).norm() <= 2 * (other - want).norm()


def test_training_with_dropout_or_padding_is_sdpas(calls):
    for model in pair("llama", attention_dropout=0.5)[:1]:
        weight_gradients(model)
    ours, theirs = pair("llama")
    assert torch.equal(*(weight_gradients(model, attention_mask=PADDED) for model in (ours, theirs)))
    assert not calls


def test_float32_is_sdpas(calls):
    ours, theirs = pair("llama", torch.float32)
    assert torch.equal(logits(ours, PROMPT), logits(theirs, PROMPT)) and not calls


def test_what_nobody_would_compute_raises():
    q = k = v = torch.zeros(1, 2, 4, 16, dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError, match="attention sinks"):
        room.attention(None, q, k, v, None, s_aux=torch.zeros(2))
    with pytest.raises(ValueError, match="softcap"):
        room.attention(None, q, k, v, None, softcap=30.0)


SLIDING = {
    "mistral": (transformers.MistralConfig, dict(sliding_window=16)),
    "qwen2": (
        transformers.Qwen2Config,
        dict(sliding_window=16, use_sliding_window=True, layer_types=["full_attention", "sliding_attention"]),
    ),
}
sliding = pytest.mark.parametrize("family", SLIDING)


def sliding_pair(family, monkeypatch, dtype=torch.bfloat16):
    config, changes = SLIDING[family]
    monkeypatch.setitem(CONFIGS, family, config)
    return pair(family, dtype, **changes)


def sides(family):
    """Of the two layers."""
    return [(15, 0)] * 2 if family == "mistral" else [None, (15, 0)]


@sliding
def test_sliding_windows(family, calls, monkeypatch):
    """Without a mask: prefill by the window, decoding by the keys that the cache has kept."""
    ours, theirs = sliding_pair(family, monkeypatch)
    reference = sliding_pair(family, monkeypatch, torch.float32)[1]
    reference.load_state_dict({name: x.float() for name, x in theirs.state_dict().items()})
    want, mine, other = logits(reference, PROMPT), logits(ours, PROMPT), logits(theirs, PROMPT)
    assert calls == [(37, 37, True)] * 2 and windows == sides(family)
    ulp = torch.finfo(torch.bfloat16).eps * want.abs().max()
    assert (mine - want).abs().max() <= 2 * (other - want).abs().max() + ulp
    assert not torch.allclose(mine[:, -1], logits(pair("llama")[0], PROMPT)[:, -1], atol=1e-2), "another model"
    calls.clear()
    same_choices(ours, theirs, generate(ours, PROMPT), generate(theirs, PROMPT))
    assert len(calls) == 2 * 256, "each step of each layer is ours"


@sliding
def test_sliding_windows_that_are_not_ours(family, calls, monkeypatch):
    """Padding, float32 and dropout: sdpa's attention, and it is not without the window."""
    ours, theirs = sliding_pair(family, monkeypatch)
    padded = [logits(model, PROMPT, attention_mask=PADDED)[PADDED.bool()] for model in (ours, theirs)]
    assert torch.equal(*padded) and not calls
    ours, theirs = sliding_pair(family, monkeypatch, torch.float32)
    torch.testing.assert_close(logits(ours, PROMPT), logits(theirs, PROMPT))
    assert not calls


def test_what_slides():
    from transformers import masking_utils as masks

    for size in (1, 2, 7, 4096):
        assert room.slides(masks.sliding_window_causal_mask_function(size), size)
        assert not room.slides(masks.causal_mask_function, size)
        assert not room.slides(masks.sliding_window_bidirectional_mask_function(size), size)
        if size > 1:
            chunk = masks.chunked_causal_mask_function(size, torch.zeros(1, dtype=torch.int64))
            assert not room.slides(chunk, size)
