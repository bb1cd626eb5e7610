"""Models of Hugging Face transformers from small random configurations, on the CPU, beside their own sdpa attention."""

import pytest
import torch

from cute_attn import api, reference
from cute_attn.integrations import transformers as room
from cute_attn.integrations import transformers_masks, transformers_models

transformers = pytest.importorskip("transformers", reason='transformers is missing: pip install "cute_attn[test]"')
from tests.support.models import (  # noqa: E402
    CONFIGS,
    EAGER,
    FAMILIES,
    SIZES,
    by_definition,
    family_pair,
    logits,
    needs_lengths,
    of_bits_alone,
    on_the_gpu,
    pair,
    same_choices,
)

families = pytest.mark.parametrize("family", CONFIGS)
PROMPT = torch.arange(2 * 37).reshape(2, 37) * 7 % 198 + 1
PADDED = torch.ones_like(PROMPT)
PADDED[0, :11] = 0


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
def test_generation_with_left_padding(family, calls):
    """In a step the two query heads of a K/V head are two queries of it."""
    ours, theirs = pair(family)
    mine, other = (generate(model, PROMPT, attention_mask=PADDED) for model in (ours, theirs))
    same_choices(ours, theirs, mine, other, attention_mask=PADDED)
    assert calls == [(37, 37, True)] * 2 + [(2, n, False) for n in range(38, 37 + 256) for _ in range(2)]


def test_chunks_of_a_prompt(calls):
    """The second chunk's queries are aligned to the last key; what both say together is what one pass says."""
    ours, _ = pair("llama")
    cache = transformers.DynamicCache()
    chunks = [logits(ours, PROMPT[:, part], past_key_values=cache) for part in (slice(0, 20), slice(20, 37))]
    assert calls == [(20, 20, True)] * 2 + [(17, 37, True)] * 2
    torch.testing.assert_close(torch.cat(chunks, 1), logits(ours, PROMPT), atol=0.02, rtol=0.05)


@pytest.mark.parametrize("changes", [dict(head_dim=20), dict(head_dim=520)], ids=str)
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
    assert calls == [(37, 37, True)] * (4 if checkpointing else 2)
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
    with pytest.raises(NotImplementedError, match="s_aux: not supported here, and NoneType has no eager attention"):
        room.attention(None, q, k, v, None, s_aux=torch.zeros(2), dropout=0.5)
    with pytest.raises(NotImplementedError, match="indices: sparse attention is not supported"):
        room.attention(None, q, k, v, None, indices=torch.zeros(1, 4, 2))
    with pytest.raises(ValueError, match="None came with 2 queries, causal, and 4 keys"):
        room.attention(None, q[:, :, :2], k, v, None)


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
    """Float32: sdpa's attention, and it is not without the window, nor without the padding."""
    ours, theirs = sliding_pair(family, monkeypatch, torch.float32)
    torch.testing.assert_close(logits(ours, PROMPT), logits(theirs, PROMPT))
    assert torch.equal(*(logits(model, PROMPT, attention_mask=PADDED) for model in (ours, theirs)))
    assert not calls


def test_what_slides():
    from transformers import masking_utils as masks

    assert transformers_masks.slides(masks.causal_mask_function, None)
    assert not transformers_masks.slides(masks.bidirectional_mask_function, None)
    assert not transformers_masks.slides(lambda *places: masks.causal_mask_function(*places), None)
    for size in (1, 2, 7, 4096):
        function = masks.sliding_window_causal_mask_function(size)
        assert transformers_masks.slides(function, size)
        assert not transformers_masks.slides(function, None) and not transformers_masks.slides(function, size + 1)
        assert not transformers_masks.slides(masks.causal_mask_function, size)
        assert not transformers_masks.slides(masks.sliding_window_bidirectional_mask_function(size), size)
        assert not transformers_masks.slides(masks.and_masks(function, masks.causal_mask_function), size)
        chunk = masks.chunked_causal_mask_function(size, torch.zeros(1, dtype=torch.int64))
        assert not transformers_masks.slides(chunk, size)


every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture
def exact(monkeypatch, one_thread):
    """flash_fwd by definition, float32 too, so that nothing but which pairs count can differ; what it was asked for."""
    seen = []

    def flash_fwd(q, k, v, *, out=None, **how):
        seen.append((q.shape[2], k.shape[2], how))
        return by_definition(q, k, v, out=out, **how)

    monkeypatch.setattr(api, "flash_fwd", flash_fwd)
    monkeypatch.setitem(room.DTYPES, torch.float32, "fp32")
    return seen


def prefilled(calls, family, keys=37):
    """Of the prefill of both layers."""
    sides = [how["window"] for _, _, how in calls[:2]]
    window = [None if size is None else (size - 1, 0) for size in FAMILIES[family][2]]
    modified = [(how["softcap"], "sinks" in how) for _, _, how in calls]
    capped, sunk = 0.5 if family == "gemma2" else None, family == "gpt_oss"
    return [c[:2] for c in calls[:2]] == [(keys, keys)] * 2 and sides == window and {*modified} == {(capped, sunk)}


@every_family
def test_a_family_sees_the_pairs_that_transformers_sees(family, exact, monkeypatch):
    """Equal logits and tokens: prefill, a growing cache, a static one, chunks of a prompt."""
    ours, theirs = family_pair(family, monkeypatch)
    torch.testing.assert_close(logits(ours, PROMPT), logits(theirs, PROMPT), atol=2e-5, rtol=1e-4)
    assert len(exact) == 2 and prefilled(exact, family)
    for how in ({}, dict(cache_implementation="static", disable_compile=True), dict(prefill_chunk_size=10)):
        exact.clear()
        mine, other = (
            model.generate(PROMPT, do_sample=False, min_new_tokens=20, max_new_tokens=20, **how)
            for model in (ours, theirs)
        )
        assert torch.equal(mine, other)
        assert len(exact) == (2 if "disable_compile" in how else 2 * 20 if not how else 2 * (4 + 19))
        assert "prefill_chunk_size" in how or family == "olmoe" or prefilled(exact, family)


@every_family
def test_a_familys_padding(family, exact, monkeypatch):
    """Left padding: equal tokens, with a growing cache, a static one (of which the steps are not ours), in chunks."""
    ours, theirs = family_pair(family, monkeypatch)
    for how in ({}, dict(cache_implementation="static", disable_compile=True), dict(prefill_chunk_size=10)):
        exact.clear()
        mine, other = (
            model.generate(PROMPT, attention_mask=PADDED, do_sample=False, min_new_tokens=20, max_new_tokens=20, **how)
            for model in (ours, theirs)
        )
        assert torch.equal(mine, other)
        assert len(exact) == (2 if "disable_compile" in how else 2 * 20 if not how else 2 * (4 + 19))
        assert any("mask_mod" in how for _, _, how in exact)
        assert "prefill_chunk_size" in how or family == "olmoe" or prefilled(exact, family)


@pytest.mark.parametrize("family", ["mistral", *EAGER])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_familys_gradients(family, reentrant, exact, monkeypatch):
    """Equal, through checkpoints too; softcaps and sinks have no backward, and are the model's eager attention's."""
    ours, theirs = family_pair(family, monkeypatch)
    if reentrant is not None:
        ours.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
    torch.testing.assert_close(weight_gradients(ours), weight_gradients(theirs), atol=1e-5, rtol=1e-3)
    first_without_gradients = reentrant is True
    assert bool(exact) == (family not in EAGER or first_without_gradients)


def lazy(size=5, queries=8, first=0, keys=None, **more):
    """Our mask, and sdpa's."""
    from transformers.masking_utils import sdpa_mask, sliding_window_causal_mask_function

    how = dict(batch_size=2, q_length=queries, kv_length=keys or first + queries, q_offset=first, **more)
    how |= dict(mask_function=sliding_window_causal_mask_function(size), local_size=size)
    needs_lengths()
    return room.mask(**how), sdpa_mask(**how)


OPERATIONS = [
    lambda x: x[:, :, :, :6],
    lambda x: x[:, 0],
    lambda x: ~x,
    lambda x: x & x,
    lambda x: x.clone(),
    lambda x: x.expand(2, 4, 8, 8),
    lambda x: x.repeat_interleave(2, 0),
    lambda x: torch.cat([x, x], -1),
    lambda x: torch.nn.functional.pad(x, (0, 2)),
    lambda x: torch.where(x, 0.0, -1.0),
    lambda x: torch.zeros(2, 1, 8, 8).masked_fill(~x, 1),
    lambda x: torch.zeros(2, 1, 8, 8).masked_fill_(x.logical_not(), 1),
    lambda x: torch.nn.functional.scaled_dot_product_attention(*[torch.eye(8).expand(2, 1, 8, 8)] * 3, attn_mask=x),
]


@pytest.mark.parametrize("operation", range(len(OPERATIONS)))
def test_whatever_looks_at_a_mask_gets_sdpas(operation):
    """What is still a mask is never taken for the whole one, nor for anything but a mask."""
    ours, theirs = lazy()
    found, want = OPERATIONS[operation](ours), OPERATIONS[operation](theirs)
    assert torch.equal(found, want) and (found.shape, found.dtype) == (want.shape, want.dtype)
    assert of_bits_alone(found) if want.dtype == torch.bool else type(found) is torch.Tensor


MISREADINGS = {
    "scores + mask": lambda x: torch.zeros(2, 1, 8, 8) + x,
    "mask + scores": lambda x: x + torch.zeros(2, 1, 8, 8),
    "scores += mask": lambda x: torch.zeros(2, 1, 8, 8).add_(x),
    "a part of it": lambda x: torch.zeros(2, 1, 8, 6) + x[:, :, :, :6],
    "of several": lambda x: torch.zeros(2, 1, 8, 8) + (x & x),
    "float()": lambda x: x.float(),
    "long()": lambda x: x.long(),
    "another's type": lambda x: x.type_as(torch.zeros(1)),
    "1 - float()": lambda x: 1.0 - x.float(),
    "scores * mask": lambda x: torch.zeros(2, 1, 8, 8) * x,
    "masked_fill": lambda x: torch.zeros(2, 1, 8, 8).masked_fill(x, 1),
    "masked_fill of bool()": lambda x: torch.zeros(2, 1, 8, 8).masked_fill(x.to(torch.bool), 1),
    "masked_fill_": lambda x: torch.zeros(2, 1, 8, 8).masked_fill_(x, 1),
    "mask == 0": lambda x: torch.where(x == 0, torch.zeros(2, 1, 8, 8), -1.0),
    "mask < 0": lambda x: torch.zeros(2, 1, 8, 8).masked_fill(x < 0, -1.0),
    "masked_fill of ~~": lambda x: torch.zeros(2, 1, 8, 8).masked_fill(~~x, 1),
}


@pytest.mark.parametrize("misreading", MISREADINGS)
def test_whoever_adds_a_mask_has_an_attention_of_its_own(misreading):
    with pytest.raises((NotImplementedError, RuntimeError), match='attn_implementation="eager"'):
        MISREADINGS[misreading](lazy()[0])


def bloom(implementation):
    config = transformers.BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=199)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()


def test_a_model_that_never_asks_raises_when_it_is_made():
    """With a hint; also where the whole model asks, but a part of it does not."""
    hint = r'attn_implementation="eager", or for the parts of a composite model .*"vision_config": "eager"'
    name = room.register()
    with pytest.raises(ValueError, match=f"BloomForCausalLM: BloomAttention computes .* not by cute_attn; use {hint}"):
        bloom(name)
    config = transformers.FalconConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=199)
    with pytest.raises(ValueError, match="FALCON_ATTENTION_CLASSES has nothing for cute_attn; use"):
        transformers.AutoModelForCausalLM.from_config(config, attn_implementation=name)
    parts = transformers.ViTConfig(**VIT), transformers.TrOCRConfig(d_model=64, decoder_layers=1, **TROCR)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(*parts)
    with pytest.raises(ValueError, match=r"TrOCRForCausalLM: TrOCRAttention computes"):
        transformers.VisionEncoderDecoderModel._from_config(config, attn_implementation=name)
    mixed = transformers.VisionEncoderDecoderModel._from_config(
        config, attn_implementation={"encoder": name, "decoder": "eager"}
    )
    assert mixed.encoder.config._attn_implementation == name


VIT = dict(
    hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8
)
TROCR = dict(decoder_attention_heads=4, decoder_ffn_dim=64, vocab_size=199, max_position_embeddings=64)


def test_a_model_that_nobody_knows_raises_when_it_is_asked(monkeypatch):
    """In a graph nothing can raise: there it gets eager attention's mask, and computes what it would with that."""
    room.register()
    monkeypatch.setattr(transformers_models, "refuse", lambda *_: None)
    ours, theirs = bloom(room.NAME), bloom("eager")
    for how in ({}, dict(attention_mask=PADDED)):
        with pytest.raises(NotImplementedError, match=r'add.Tensor of a mask is by a model .*="eager"'):
            ours(PROMPT, **how)
        torch._dynamo.reset()
        compiled = torch.compile(ours, backend="eager")
        assert torch.equal(*(logits(model, PROMPT, use_cache=False, **how) for model in (compiled, theirs)))


def test_a_sparse_attention_among_its_parts_is_found():
    """By names of a class's functions: of a table, of a helper's class, and of nothing that takes no mask."""
    from transformers.models.bert.modeling_bert import BertModel
    from transformers.models.mixtral.modeling_mixtral import MixtralModel
    from transformers.models.pegasus_x.modeling_pegasus_x import PegasusXModel

    found = transformers_models.attention_of(PegasusXModel)
    assert found.ask == ("PegasusXAttention",) and found.own == ("PegasusXGlobalLocalAttention",) and found.masked
    for model in (BertModel, MixtralModel):  # a router's softmax is none
        assert transformers_models.attention_of(model)[1:3] == ((), ())
    assert transformers_models.asks(transformers.BertConfig) and not transformers_models.asks(transformers.BloomConfig)


def test_register_twice_is_register_once():
    room.register()
    asked = transformers.PreTrainedModel.get_correct_attn_implementation
    room.register()
    assert transformers.PreTrainedModel.get_correct_attn_implementation is asked


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("eager", [True, False])
def test_a_mask_of_one_key_is_spread_over_all(where, eager, monkeypatch):
    """MiniMax's steps behind left padding: torch's kernels would read the mask of 38 keys where there is one."""
    module = transformers.models.llama.modeling_llama.LlamaAttention(transformers.LlamaConfig(**SIZES), 0).eval()
    if not eager:
        monkeypatch.setattr(room, "eager_of", lambda kind: None)
    q, k, v = (torch.randn(2, h, n, 16, dtype=torch.bfloat16, device=where) for h, n in ((4, 1), (2, 38), (2, 38)))
    mask = torch.tensor([False, True], device=where).reshape(2, 1, 1, 1)
    handed, sdpa = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *x, **how: handed.append(how["attn_mask"]) or sdpa(*x, **how),
    )
    o, _ = room.attention(module, q, k, v, mask, scaling=0.25)
    want = reference.attention(q[1:], k[1:], v[1:], scale=0.25)[0].float()
    torch.testing.assert_close(o[1:].transpose(1, 2).float(), want.to(where), atol=0.02, rtol=0.02)
    assert all(x.shape[-1] == 38 and x.stride(-1) == 1 for x in handed) and len(handed) == (not eager)
    if eager:  # which takes a row of hidden keys for one of equal scores
        mean = v[:1].float().mean(2).repeat_interleave(2, 1)
        torch.testing.assert_close(o[0, 0].float(), mean[0], atol=0.02, rtol=0.02)


def test_a_mask_is_one_to_whoever_only_hands_it_on():
    ours, theirs = lazy()
    assert type(ours) is room.LazyMask and (ours.keys, ours.window) == (8, 5)
    assert isinstance(ours, torch.Tensor) and ours.ndim == 4 and not ours.is_floating_point()
    assert (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device)
    assert ours.contiguous() is ours and ours.to("cpu") is ours and ours.bool() is ours
    moved = ours.to("meta", non_blocking=True)
    assert type(moved) is room.LazyMask and (moved.keys, moved.window) == (8, 5) and moved.make().is_meta
    detached = ours.detach()  # as a checkpoint does with what it is given
    assert (detached.keys, detached.causal, detached.window) == (8, True, 5) and torch.equal(detached, theirs)
    for out in (lambda: ours.numpy(), lambda: ours.tolist(), lambda: ours.storage().data_ptr()):
        with pytest.raises(RuntimeError):
            out()


def test_when_a_mask_is_needed_or_none_at_all():
    for size in (8, 9):  # it hides nothing that causality does not
        mask = lazy(size=size)[0]
        assert (mask.keys, mask.causal, mask.window, mask.among) == (8, True, None, None)
    assert lazy(queries=1, first=4)[0] is None and lazy(queries=1, first=5)[0].window == 5
    static = lazy(first=torch.tensor(0), keys=20)[0]
    assert (static.keys, static.window) == (8, 5), "the rest of an empty static cache is not filled"
    assert of_bits_alone(lazy(first=torch.tensor(3), keys=20)[0])
    assert of_bits_alone(lazy(allow_is_causal_skip=False)[0])
    real = torch.ones(2, 8, dtype=torch.bool)
    assert lazy(attention_mask=real)[0].among is None
    assert of_bits_alone(lazy(attention_mask=real[:, :7])[0]), "it does not reach the last query"
    real[1, 0] = False
    assert torch.equal(lazy(attention_mask=real)[0].among.real, real)
    last = lazy(attention_mask=real, queries=2, first=6, keys=7, kv_offset=1)[0]
    assert last.among is None and last.keys == 7, "the padding is not among these keys"


def test_a_mask_that_does_not_fit_the_keys_is_not_taken_for_one_that_does(exact):
    q, k = torch.randn(2, 4, 8, 16), torch.randn(2, 4, 9, 16)
    with pytest.raises(RuntimeError, match="size"):
        room.attention(torch.nn.Identity(), q, k, k, lazy()[0])
    assert not exact


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_mask_may_enter_a_compiled_region(dtype, one_thread):
    """As transformers' compiled layers get it; another window or another length is another mask."""
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    torch._dynamo.reset()
    module = torch.nn.Identity()
    layer = torch.compile(
        lambda q, k, v, mask: room.attention(module, q * 1, k, v, mask, sliding_window=3)[0],
        backend="aot_eager",
        fullgraph=True,
    )
    for size, queries, first, keys in ((5, 8, 0, 8), (3, 8, 0, 8), (5, 8, 2, 10), (5, 9, 0, 9), (2, 9, 0, 12)):
        ours, theirs = lazy(size, queries, first, keys)
        q, k, v = (torch.randn(2, 4, n, 16, dtype=dtype) for n in (queries, keys, keys))
        want = sdpa(q.double(), k.double(), v.double(), attn_mask=theirs).transpose(1, 2)
        atol = 16 * torch.finfo(dtype).eps
        torch.testing.assert_close(layer(q, k, v, ours).double(), want, atol=atol, rtol=atol)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gemma2", "gpt_oss"])
def test_a_family_on_the_gpu(family, calls, monkeypatch):
    """Prefill, two chunks and steps, no worse than twice transformers' own, both against the weights in float32."""
    truth, ours, theirs = on_the_gpu(family, monkeypatch)
    tokens = torch.randint(1, 199, (2, 333), device="cuda")

    def answers(model):
        cache = transformers.DynamicCache(config=model.config)
        parts = tokens.split([200, 130, 1, 1, 1], dim=1)
        chunks = [logits(model, part, past_key_values=cache) for part in parts]
        return torch.cat([*chunks, logits(model, tokens)], dim=1)

    want, mine, other = (answers(model) for model in (truth, ours, theirs))
    asked = [(200, 200), (130, 330), (1, 331), (1, 332), (1, 333), (333, 333)]
    if FAMILIES[family][2][0] is None:
        assert [call[:2] for call in calls[::2]] == asked
    assert len(calls) == 2 * len(asked), "each part of each layer is ours"
    ulp = torch.finfo(torch.bfloat16).eps * want.abs().max()
    assert not mine.isnan().any()
    assert (mine - want).abs().max() <= 2 * (other - want).abs().max() + ulp
