"""Padded batches and packed sequences in models of Hugging Face transformers, beside their own attention."""

from functools import partial

import pytest
import torch

from cute_attn import api, block_mask, mods, reference, varlen
from cute_attn.integrations import transformers as room
from cute_attn.integrations import transformers_masks as masks

transformers = pytest.importorskip("transformers", reason='transformers is missing: pip install "cute_attn[test]"')
from tests.support.models import (  # noqa: E402
    EAGER,
    FAMILIES,
    by_definition,
    family_pair,
    logits,
    needs_lengths,
    of_bits_alone,
    on_the_gpu,
    same_choices,
)

SOME = ["llama", "qwen3", "mistral", "gemma2", "gemma3", "gpt_oss"]
families = pytest.mark.parametrize("family", SOME)
TOKENS = torch.arange(4 * 37).reshape(4, 37) * 7 % 198 + 1
REAL = torch.tensor([37, 26, 9, 1])[:, None]  # tokens of each row
places = torch.arange(37)
LEFT, RIGHT, HOLES = places >= 37 - REAL, places < REAL, (places + REAL) % 5 != 2
PADDINGS = {"left": LEFT, "right": RIGHT, "of both sides": LEFT.where(REAL != 9, RIGHT), "holes": HOLES}
paddings = pytest.mark.parametrize("padding", PADDINGS)


@pytest.fixture
def exact(monkeypatch, one_thread):
    """Both functions by definition, float32 too, so that only which pairs count can differ; what they were asked."""
    seen = []

    def flash_fwd(q, k, v, *, out=None, **how):
        seen.append(dict(how, q=q, k=k, v=v))
        return by_definition(q, k, v, out=out, **how)

    def flash_fwd_varlen(q, k, v, cu_q, cu_k, *, out=None, max_seqlen_q=None, max_seqlen_k=None, **how):
        seen.append(dict(how, q=q, k=k, v=v, lengths=(cu_q.tolist(), cu_k.tolist()), longest=max_seqlen_q))
        assert cu_q.dtype == cu_k.dtype == torch.int32 and max_seqlen_q == max_seqlen_k
        o = q.new_full((*q.shape[:2], v.shape[2]), torch.nan) if out is None else out
        for rows, part, _ in reference.varlen(q, k, v, cu_q, cu_k, dtype=torch.float32, **how):
            o[rows] = part
        return o

    monkeypatch.setattr(api, "flash_fwd", flash_fwd)
    monkeypatch.setattr(varlen, "flash_fwd_varlen", flash_fwd_varlen)
    monkeypatch.setitem(room.DTYPES, torch.float32, "fp32")
    return seen


def sides(family):
    """Windows of the two layers."""
    return [None if size is None else (size - 1, 0) for size in FAMILIES[family][2]]


def close(mine, other):
    torch.testing.assert_close(mine, other, atol=3e-5, rtol=1e-4)


def where_real(real, mine, other):
    assert not mine.isnan().any(), "padding too"
    close(mine[real], other[real])


# Padded batches


@families
@paddings
def test_padded_prefill(family, padding, exact, monkeypatch):
    """Right padding alone is left to causality; any other goes by a mask_mod and lists."""
    ours, theirs = family_pair(family, monkeypatch)
    real = PADDINGS[padding]
    where_real(real, *(logits(model, TOKENS, attention_mask=real.long()) for model in (ours, theirs)))
    assert [call["window"] for call in exact] == sides(family) and all(call["causal"] for call in exact)
    assert ["mask_mod" in call and "block_mask" in call for call in exact] == [padding != "right"] * 2
    matters = (logits(ours, TOKENS) - logits(ours, TOKENS, attention_mask=real.long()))[real].abs().max() > 1e-3
    assert matters == (padding != "right")


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss"])
def test_padding_of_whole_blocks(family, exact, monkeypatch):
    ours, theirs = family_pair(family, monkeypatch, max_position_embeddings=1024)
    tokens = torch.arange(3 * 300).reshape(3, 300) * 7 % 198 + 1
    real = torch.arange(300) >= torch.tensor([0, 141, 270])[:, None]
    where_real(real, *(logits(model, tokens, attention_mask=real.long()) for model in (ours, theirs)))
    lists = exact[0]["block_mask"]
    named = (lists.kv_num_blocks + lists.full_kv_num_blocks)[:, 0].tolist()
    near = [[1, 2, 2]] if family == "mistral" else [[1, 2, 3]]  # of the row without padding
    assert named == [*near, [0, 1, 2], [0, 0, 1]]
    assert lists.kv_num_blocks[:, 0].tolist() == [[0, 0, 0], [0, 1, 1], [0, 0, 1]], "of which mask_mod is asked"


@families
@pytest.mark.parametrize("padding", ["left", "holes", "right"])
def test_padded_chunks_and_steps(family, padding, exact, monkeypatch):
    """With a growing cache; behind a prompt that is padded on the right a step's keys have holes."""
    ours, theirs = family_pair(family, monkeypatch)
    real = torch.cat([PADDINGS[padding], torch.ones(4, 3, dtype=torch.bool)], dim=1)
    tokens = torch.cat([TOKENS, TOKENS[:, :3]], dim=1)
    parts = (0, 20), (20, 37), (37, 38), (38, 39), (39, 40)

    def chunks(model):
        cache = transformers.DynamicCache(config=model.config)
        how = [dict(attention_mask=real[:, :end].long(), past_key_values=cache) for _, end in parts]
        every = [logits(model, tokens[:, slice(*part)], **more) for part, more in zip(parts, how, strict=True)]
        return torch.cat(every, dim=1)

    where_real(real, chunks(ours), chunks(theirs))
    assert len(exact) == 2 * len(parts), "each part of each layer is ours"
    full = FAMILIES[family][2].index(None) if None in FAMILIES[family][2] else None
    if full is not None:  # that layer keeps all keys
        sizes = [(call["q"].shape[2], call["k"].shape[2], "mask_mod" in call) for call in exact[full::2]]
        n = 1 if family == "gpt_oss" else 2  # queries of a step: heads that share a K/V head, but for sinks
        chunk = padding != "right"
        assert sizes == [(20, 20, chunk), (17, 37, chunk), (n, 38, True), (n, 39, True), (n, 40, True)]


@pytest.mark.parametrize("family", ["qwen3", "mistral", "gemma2"])
def test_padded_generation_in_bf16(family, monkeypatch, one_thread):
    """By torch in float32, rounded: the same choices as transformers'; each step of each layer is ours."""
    ours, theirs = family_pair(family, monkeypatch, torch.bfloat16)
    seen, flash_fwd = [], api.flash_fwd
    monkeypatch.setattr(api, "flash_fwd", lambda *x, **how: seen.append(how) or flash_fwd(*x, **how))
    how = dict(attention_mask=LEFT.long(), do_sample=False, min_new_tokens=24, max_new_tokens=24)
    mine, other = (model.generate(TOKENS, **how) for model in (ours, theirs))
    same_choices(ours, theirs, mine, other, attention_mask=LEFT.long())
    assert len(seen) == 2 * 24 and "mask_mod" in seen[0]


def test_lists_and_masks_are_made_once_for_all_layers(exact, monkeypatch):
    ours, _ = family_pair("qwen2", monkeypatch, num_hidden_layers=4, layer_types=["full_attention"] * 4)
    made, listed = [], masks.listed
    monkeypatch.setattr(masks, "listed", lambda *how: made.append(how) or listed(*how))
    logits(ours, TOKENS, attention_mask=LEFT.long())
    assert len(made) == 1 and len(exact) == 4
    assert len({id(call["mask_mod"]) for call in exact}) == 1


def test_one_kernel_serves_any_padding():
    """Functions with one key are compiled once: what they capture comes at run time."""
    kernels = [mods.prepare("mask_mod", masks.only(real), ()).kernel for real in (LEFT, RIGHT[:2], HOLES[:, 5:])]
    assert kernels[0] == kernels[1] == kernels[2]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 70, 128, 200])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 300), (128, 128), (300, 300), (130, 389), (129, 512)])
def test_listed_blocks(causal, window, queries, keys):
    """Together with causality and the window, lists and mask_mod say what is seen; blocks have what they must."""
    torch.manual_seed(0)
    starts, ends = torch.tensor([0, keys // 2, keys - 1, 0]), torch.tensor([keys, keys, keys, keys // 3])
    real = (torch.arange(keys) >= starts[:, None]) & (torch.arange(keys) < ends[:, None])
    real = torch.cat([real, torch.rand(1, keys) < 0.5])
    lists = masks.listed(real, queries, causal, masks.sides_of(causal, window))
    fitted = block_mask.fit(lists, 5, 1, queries, keys, real.device)
    q, k = torch.arange(queries)[:, None], torch.arange(keys)
    last = q + keys - queries
    near = (k <= last) & (k > last - (window or keys)) if causal else (k - last).abs() <= (window or 2 * keys)
    mod = mods.prepare("mask_mod", masks.only(real), ())
    of_near, of_real = _blocks(near[None])[0], _blocks(real[:, None].expand(-1, queries, -1))
    for b in range(5):
        assert torch.equal(fitted.visible(mod.function, b, 0, q, k) & near, near & real[b])
        whole = block_mask._dense(lists.full_kv_num_blocks, lists.full_kv_indices, b, 0)
        asked = block_mask._dense(lists.kv_num_blocks, lists.kv_indices, b, 0)
        assert torch.equal(whole | asked, of_near & of_real[b]) and not (whole & asked).any()
        assert not (whole & _blocks(~real[b].expand(1, queries, -1))[0]).any()


def _blocks(pairs):
    """(B, rows, columns): which blocks have any."""
    rows, columns = (-(-n // 128) * 128 for n in pairs.shape[1:])
    wide = pairs.new_zeros(len(pairs), rows, columns)
    wide[:, : pairs.shape[1], : pairs.shape[2]] = pairs
    return wide.unflatten(2, (-1, 128)).unflatten(1, (-1, 128)).any(4).any(2)


ENCODERS = {
    "bert": (transformers.BertConfig, {}, [None, None]),
    "modernbert": (
        transformers.ModernBertConfig,
        dict(local_attention=12, global_attn_every_n_layers=2, pad_token_id=0, cls_token_id=1, sep_token_id=2),
        [None, (6, 6)],
    ),
}
SMALL = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=199)


def encoder_pair(family, dtype=torch.float32):
    config, more, windows = ENCODERS[family]
    made = [
        transformers.AutoModel.from_config(config(**SMALL, **more), attn_implementation=name, dtype=dtype).eval()
        for name in (room.register(), "eager")
    ]
    with torch.no_grad():
        for x in made[1].parameters():
            x.mul_(3) if x.dim() > 1 else None
    made[0].load_state_dict(made[1].state_dict())
    return *made, windows


@torch.no_grad()
def states(model, tokens, **how):
    return model(tokens, **how).last_hidden_state


def needs_encoders():
    from transformers import masking_utils

    if not hasattr(masking_utils, "sliding_window_bidirectional_mask_function"):
        pytest.skip(f"transformers {transformers.__version__} has encoders make their masks themselves")


@paddings
@pytest.mark.parametrize("family", ENCODERS)
def test_padded_encoders(family, padding, exact):
    """Keys that are real, before a query and behind it, and in a window on both sides; q, k and v as they lie."""
    needs_encoders()
    ours, theirs, windows = encoder_pair(family)
    real = PADDINGS[padding]
    where_real(real, *(states(model, TOKENS, attention_mask=real.long()) for model in (ours, theirs)))
    assert [call["window"] for call in exact] == windows and not any(call["causal"] for call in exact)
    assert all("mask_mod" in call and "block_mask" in call for call in exact)
    assert all(x.shape[1:] == (4, 37, 16) for call in exact for x in (call["q"], call["k"], call["v"]))
    matters = (states(ours, TOKENS) - states(ours, TOKENS, attention_mask=real.long()))[real].abs().max()
    assert matters > 1e-3


@pytest.mark.parametrize("family", ENCODERS)
def test_encoders_without_padding(family, exact):
    needs_encoders()
    ours, theirs, windows = encoder_pair(family)
    for how in ({}, dict(attention_mask=torch.ones_like(TOKENS))):
        exact.clear()
        close(states(ours, TOKENS, **how), states(theirs, TOKENS, **how))
        assert [(call["causal"], call["window"]) for call in exact] == [(False, window) for window in windows]
        assert not any("mask_mod" in call for call in exact)


def test_gradients_of_padded_encoders_are_transformers_own(exact):
    needs_encoders()
    ours, theirs, _ = encoder_pair("bert")
    for model in (ours, theirs):
        model(TOKENS, attention_mask=RIGHT.long()).last_hidden_state[RIGHT].pow(3).sum().backward()
    mine, other = (torch.cat([x.grad.flatten() for x in model.encoder.parameters()]) for model in (ours, theirs))
    torch.testing.assert_close(mine, other, atol=1e-5 * float(other.abs().max()), rtol=1e-3)
    assert not exact


def test_cross_attention_over_padding(exact):
    """Of a decoder, in its prefill and its steps, to an encoder's real keys."""
    needs_encoders()
    sizes = dict(d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4)
    sizes |= dict(encoder_ffn_dim=96, decoder_ffn_dim=96, vocab_size=199, pad_token_id=0, dropout=0.0)
    sizes |= dict(bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
    ours, theirs = (
        transformers.BartForConditionalGeneration._from_config(
            transformers.BartConfig(**sizes), attn_implementation=name
        ).eval()
        for name in (room.register(), "eager")
    )
    theirs.load_state_dict(ours.state_dict())
    how = dict(attention_mask=LEFT.long(), do_sample=False, min_new_tokens=4, max_new_tokens=4)
    how |= dict(return_dict_in_generate=True, output_logits=True)
    mine, other = (torch.stack(model.generate(TOKENS, **how).logits) for model in (ours, theirs))
    close(mine, other)
    asked = [(call["q"].shape[2], call["k"].shape[2], "mask_mod" in call) for call in exact]
    assert asked[0] == (37, 37, True) and len(asked) == 1 + 2 * 4 and asked[2::2] == [(1, 37, True)] * 4


def causal_mask(real, queries, size=None, batch=None):
    """Ours, and sdpa's."""
    from transformers.masking_utils import sdpa_mask

    needs_lengths()
    keys = real.shape[1]
    how = dict(
        batch_size=batch or len(real), q_length=queries, kv_length=keys, q_offset=keys - queries, attention_mask=real
    )
    how |= dict(mask_function=masks.causality(size), local_size=size)
    return room.mask(**how), sdpa_mask(**how | dict(allow_is_causal_skip=False))


def test_q_k_and_v_of_a_padded_batch_are_read_where_they_lie(exact):
    for queries, n in ((37, 37), (1, 2)):  # a step's heads become queries, by a view
        q, k, v = (torch.randn(4, s, h, 16).transpose(1, 2) for s, h in ((queries, 4), (37, 2), (37, 2)))
        o, _ = room.attention(torch.nn.Identity(), q, k, v, causal_mask(LEFT, queries)[0])
        call = exact.pop()
        assert [call[name].data_ptr() for name in "qkv"] == [x.data_ptr() for x in (q, k, v)]
        assert call["q"].shape[2] == n and o.is_contiguous() and o.shape == (4, queries, 4, 16)


def test_a_query_that_sees_nothing_gives_0(exact):
    real = LEFT.clone()
    real[1] = False
    q, k, v = (torch.randn(4, h, 37, 16) for h in (4, 2, 2))
    o, _ = room.attention(torch.nn.Identity(), q, k, v, causal_mask(real, 37)[0], s_aux=torch.zeros(4))
    assert (o[~real] == 0).all() and not o.isnan().any() and (o[real] != 0).any(-1).all()


def test_a_step_beyond_a_sliding_window_and_one_with_sinks(exact):
    """Heads stay heads, for the window is aligned to the one query, and sinks are the heads' own."""
    q, k, v = torch.randn(4, 4, 1, 16), *torch.randn(2, 4, 2, 37, 16)
    for size, more in ((12, {}), (None, dict(s_aux=torch.randn(4)))):
        mask, bits = causal_mask(LEFT, 1, size)
        o, _ = room.attention(torch.nn.Identity(), q, k, v, mask, **more)
        want, _ = reference.attention(
            *(q, k, v), mask_mod=lambda b, h, i, j, bits=bits: bits[b, 0, i, j], sinks=more.get("s_aux")
        )
        close(o.transpose(1, 2), want.float())
        assert exact.pop()["q"].shape[2] == 1


def test_a_padded_mask_of_another_batch_is_not_taken(exact):
    mask, bits = causal_mask(LEFT[2:3], 37)
    q, k, v = (torch.randn(4, h, 37, 16) for h in (4, 2, 2))
    module = torch.nn.Identity()
    module.num_key_value_groups = 2
    close(room.attention(module, q, k, v, mask)[0], room.attention(module, q, k, v, bits)[0])
    assert not exact
    assert of_bits_alone(causal_mask(LEFT, 37, batch=2)[0])


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_static_cache_that_is_used_again(family, monkeypatch, one_thread):
    """It counts on in place before the first layer looks at the mask: float32, so that transformers' attention does."""
    ours, theirs = family_pair(family, monkeypatch)
    found = []
    for model in (ours, theirs):
        cache = transformers.StaticCache(config=model.config, max_cache_len=50)
        for real in (None, LEFT.long()):
            cache.reset()
            found.append(logits(model, TOKENS, attention_mask=real, past_key_values=cache))
    where_real(LEFT, found[1], found[3])
    close(found[0], found[2])


def test_a_padded_mask_is_one_to_whoever_looks_or_moves_it():
    ours, theirs = causal_mask(LEFT, 20, 16)
    assert type(ours) is room.LazyMask and torch.equal(ours & ours, theirs)
    moved = ours.to("meta")
    assert moved.among.real.is_meta and (moved.among.queries, moved.among.window, moved.keys) == (20, 16, 37)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_padded_mask_in_a_compiled_region_is_sdpas(dtype, one_thread):
    torch._dynamo.reset()
    module = torch.nn.Identity()
    layer = torch.compile(
        lambda q, k, v, mask: room.attention(module, q * 1, k, v, mask)[0], backend="aot_eager", fullgraph=True
    )
    for real, queries in ((LEFT, 37), (HOLES, 20)):
        ours, theirs = causal_mask(real, queries)
        q, k, v = (torch.randn(4, 4, n, 16, dtype=dtype) for n in (queries, 37, 37))
        want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=theirs).transpose(1, 2)
        assert torch.equal(layer(q, k, v, ours), want)


def weight_gradients(model, **inputs):
    model.zero_grad()
    model.train()(**inputs, use_cache=False).loss.backward()
    return torch.cat([x.grad.flatten() for x in model.parameters() if x.grad is not None]).float()


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_with_right_padding(family, checkpointing, exact, monkeypatch):
    """Of a loss that leaves padding out: equal, by causality alone. Softcaps and sinks are the model's own."""
    ours, theirs = family_pair(family, monkeypatch)
    if checkpointing:
        ours.gradient_checkpointing_enable(dict(use_reentrant=False))
    inputs = dict(input_ids=TOKENS, attention_mask=RIGHT.long(), labels=TOKENS.where(RIGHT, -100))
    mine, other = (weight_gradients(model, **inputs) for model in (ours, theirs))
    torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-3)
    assert not any("mask_mod" in call for call in exact) and bool(exact) == (family not in EAGER)


@pytest.mark.parametrize("padding", ["left", "holes", "of both sides"])
def test_gradients_with_other_padding_are_transformers_own(padding, exact, monkeypatch):
    ours, theirs = family_pair("llama", monkeypatch)
    real = PADDINGS[padding]
    inputs = dict(input_ids=TOKENS, attention_mask=real.long(), labels=TOKENS.where(real, -100))
    assert torch.equal(*(weight_gradients(model, **inputs) for model in (ours, theirs))) and not exact


# Packed sequences


PARTS = [37, 1, 20, 9]  # lengths
ENDS = [0, 37, 38, 58, 67]
ROW = torch.arange(67)[None] * 7 % 198 + 1
POSITIONS = torch.cat([torch.arange(n) for n in PARTS])[None]
SPANS = [slice(start, start + n) for start, n in zip(ENDS, PARTS, strict=False)]


def collated(**changes):
    """As transformers' own collator packs them."""
    collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch = collate([dict(input_ids=ROW[0, span].tolist()) for span in SPANS], return_tensors="pt")
    assert torch.equal(batch["input_ids"], ROW) and torch.equal(batch["position_ids"], POSITIONS)
    return dict(batch) | changes


def alone(model, **how):
    return torch.cat([logits(model, ROW[:, span], **how) for span in SPANS], dim=1)


@pytest.mark.parametrize("family", SOME[:-1])  # GPT-OSS does not tell its mask of positions
def test_packed_by_positions(family, exact, monkeypatch):
    """As transformers' own, and as each sequence alone."""
    ours, theirs = family_pair(family, monkeypatch)
    how = dict(position_ids=POSITIONS, use_cache=False)
    mine, other = (logits(model, ROW, **how) for model in (ours, theirs))
    close(mine, other)
    assert [call["lengths"] for call in exact] == [(ENDS, ENDS)] * 2
    assert [call["window"] for call in exact] == sides(family) and all(call["causal"] for call in exact)
    close(mine, alone(theirs))
    assert (mine - logits(ours, ROW, use_cache=False)).abs().max() > 1e-3, "it is not one sequence"


@families
@pytest.mark.parametrize("use_cache", [False, True])
def test_packed_by_arguments(family, use_cache, exact, monkeypatch):
    """As each sequence alone, with a cache too, where transformers masks nothing; nothing is read from the device."""
    ours, theirs = family_pair(family, monkeypatch)
    monkeypatch.setattr(masks, "read", lambda facts: pytest.fail("read"))
    inputs = collated(use_cache=use_cache)
    mine = logits(ours, inputs.pop("input_ids"), **inputs)
    assert [call.get("lengths") for call in exact] == [(ENDS, ENDS)] * 2
    assert [call["window"] for call in exact] == sides(family)
    close(mine, alone(theirs))


def test_lengths_are_read_once_for_all_layers(exact, monkeypatch):
    ours, _ = family_pair("llama", monkeypatch, num_hidden_layers=4)
    reads, read = [], masks.read
    monkeypatch.setattr(masks, "read", lambda facts: reads.append(facts) or read(facts))
    logits(ours, ROW, position_ids=POSITIONS, use_cache=False)
    assert len(reads) == 1 and len(exact) == 4


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_what_arguments_tell_holds_where_the_kernel_does_not_serve(family, monkeypatch, one_thread):
    """Float32, without a mask that says so: transformers' attention gets one."""
    ours, theirs = family_pair(family, monkeypatch)
    monkeypatch.setattr(varlen, "flash_fwd_varlen", lambda *_, **__: pytest.fail("ours"))
    inputs = collated(use_cache=True)
    close(logits(ours, inputs.pop("input_ids"), **inputs), alone(theirs))


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("by_arguments", [False, True])
def test_packed_gradients(family, reentrant, by_arguments, exact, monkeypatch):
    """Equal to transformers'; softcaps have no backward, and are the model's own."""
    ours, theirs = family_pair(family, monkeypatch)
    if reentrant is not None:
        ours.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
    inputs = collated() if by_arguments else dict(input_ids=ROW, position_ids=POSITIONS, labels=ROW)
    mine, other = (weight_gradients(model, **inputs) for model in (ours, theirs))
    torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-3)
    learning = [call for call in exact if call["longest"] is not None]
    assert all(call["lengths"] == (ENDS, ENDS) for call in exact) and all(call["longest"] == 37 for call in learning)
    assert bool(learning) == (family not in EAGER)


def test_packed_gradients_in_bf16(monkeypatch, one_thread):
    """By the real operators: no worse than twice sdpa's, both against float32."""
    ours, theirs = family_pair("mistral", monkeypatch, torch.bfloat16)
    truth = family_pair("mistral", monkeypatch)[1]
    truth.load_state_dict({name: x.float() for name, x in theirs.state_dict().items()})
    seen, flash_fwd_varlen = [], varlen.flash_fwd_varlen
    monkeypatch.setattr(varlen, "flash_fwd_varlen", lambda *x, **how: seen.append(how) or flash_fwd_varlen(*x, **how))
    inputs = dict(input_ids=ROW, position_ids=POSITIONS, labels=ROW)
    want, mine, other = (weight_gradients(model, **inputs) for model in (truth, ours, theirs))
    assert len(seen) == 2 and seen[0]["window"] == (15, 0)
    assert (mine - want).norm() <= 2 * (other - want).norm()


def test_packing_of_several_rows_is_sdpas(exact, monkeypatch):
    ours, theirs = family_pair("llama", monkeypatch)
    how = dict(position_ids=POSITIONS.expand(2, -1), use_cache=False)
    assert torch.equal(*(logits(model, ROW.expand(2, -1), **how) for model in (ours, theirs))) and not exact


def packed_mask(which, positions=None, size=None, dims=(1, 67)):
    """Ours, and sdpa's; without positions as transformers 4 makes it."""
    from transformers import masking_utils as theirs

    needs_lengths()
    within = masks.causality(size)
    if positions is not None and not hasattr(theirs, "remap_positions_for_packed_sequence"):
        pytest.skip(f"transformers {transformers.__version__} goes by places")
    if positions is not None:
        within = theirs.remap_positions_for_packed_sequence(within, positions)
    function = theirs.and_masks(within, theirs.packed_sequence_mask_function(which))
    how = dict(batch_size=dims[0], q_length=dims[1], kv_length=dims[-1], mask_function=function, local_size=size)
    return room.mask(**how, allow_is_causal_skip=False), theirs.sdpa_mask(**how, allow_is_causal_skip=False)


WHICH = torch.arange(4).repeat_interleave(torch.tensor(PARTS))[None]


@pytest.mark.parametrize("size", [None, 1, 16, 4096])
@pytest.mark.parametrize("positions", [None, POSITIONS, POSITIONS + 2])
def test_what_packs(size, positions):
    ours, theirs = packed_mask(WHICH, positions, size)
    assert type(ours) is room.LazyMask and (ours.keys, ours.window) == (67, size if size != 4096 else None)
    cu_q, cu_k, *longest = ours.among.sequences
    assert torch.equal(cu_q, torch.tensor(ENDS, dtype=torch.int32)) and cu_k is cu_q and longest == [37, 37]
    window = None if size is None else (size - 1, 0)
    assert torch.equal(ours.among.sequences.mask(67, 67, True, window), theirs)
    assert torch.equal(ours & ours, theirs)
    moved = ours.to("meta").among
    assert moved.which.is_meta and (positions is None or moved.positions.is_meta) and moved.sequences is None


def test_what_does_not_pack():
    from transformers import masking_utils as theirs

    needs_lengths()
    pack, causal = theirs.packed_sequence_mask_function(WHICH), theirs.causal_mask_function
    assert masks.packing(theirs.and_masks(causal, pack), None) is not None
    for function in (
        pack,
        theirs.or_masks(causal, pack),
        theirs.and_masks(theirs.bidirectional_mask_function, pack),
        theirs.and_masks(causal, pack, pack),
        theirs.and_masks(pack, causal),
        theirs.and_masks(causal, theirs.padding_mask_function(WHICH)),
        theirs.and_masks(causal, lambda *places: pack(*places)),
        theirs.chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.int64)),
    ):
        assert masks.packing(function, None) is None
    assert masks.packing(theirs.and_masks(causal, pack), 16) is None
    window = theirs.sliding_window_causal_mask_function(16)
    assert masks.packing(theirs.and_masks(window, pack), 16) is not None
    assert masks.packing(theirs.and_masks(window, pack), 17) is None
    assert of_bits_alone(packed_mask(WHICH.expand(2, -1), dims=(2, 67))[0])
    assert of_bits_alone(packed_mask(WHICH, dims=(1, 60))[0])
    assert of_bits_alone(packed_mask(WHICH, dims=(1, 67, 60))[0])
    how = dict(mask_function=theirs.and_masks(causal, pack), allow_is_causal_skip=False)
    with pytest.raises(IndexError):
        room.mask(batch_size=2, q_length=67, kv_length=67, **how)


def test_sequences_that_are_out_of_order_are_sdpas(exact):
    """The same number in two places, and positions that do not count up by 1 within a sequence."""
    q, k, v = (torch.randn(1, h, 67, 16) for h in (4, 2, 2))
    module = torch.nn.Identity()
    module.num_key_value_groups = 2
    for which, positions in (
        (WHICH % 2, None),
        (WHICH, POSITIONS * 2),
        (WHICH, POSITIONS[:, torch.arange(66, -1, -1)]),
    ):
        ours, theirs = packed_mask(which, positions)
        assert type(ours) is room.LazyMask and ours.among.sequences is None
        assert torch.equal(room.attention(module, q, k, v, ours)[0], room.attention(module, q, k, v, theirs)[0])
    assert not exact


def test_q_k_and_v_of_packed_sequences_are_read_where_they_lie(exact):
    q, k, v = torch.randn(1, 67, 8, 16).transpose(1, 2).split([4, 2, 2], dim=1)  # of one projection
    o, _ = room.attention(torch.nn.Identity(), q, k, v, packed_mask(WHICH)[0])
    assert [exact[0][name].data_ptr() for name in "qkv"] == [x.data_ptr() for x in (q, k, v)]
    assert exact[0]["q"].shape == (67, 4, 16) and o.is_contiguous() and o.shape == (1, 67, 4, 16)


def told(queries, keys, **more):
    """FlashAttentionKwargs."""
    lengths = (torch.tensor(x).diff().max() for x in (queries, keys))
    return dict(zip(room.PACKED, (torch.tensor(queries), torch.tensor(keys), *lengths), strict=True)) | more


@pytest.mark.parametrize("causal", [False, True])
def test_more_keys_than_queries(causal, exact, monkeypatch):
    """Aligned to the last key of each sequence, by the kernel and by the mask that sdpa attention gets."""
    q, k, v = (torch.randn(1, 2, n, 16) for n in (12, 20, 20))
    how = told([0, 5, 5, 12], [0, 6, 9, 20], is_causal=causal)
    o, _ = room.attention(torch.nn.Identity(), q, k, v, None, **how)
    for rows, keys in ((slice(0, 5), slice(0, 6)), (slice(5, 12), slice(9, 20))):
        want, _ = reference.attention(q[:, :, rows], k[:, :, keys], v[:, :, keys], causal=causal)
        close(o[:, rows].transpose(1, 2), want.float())
    monkeypatch.delitem(room.DTYPES, torch.float32)
    close(room.attention(torch.nn.Identity(), q, k, v, None, **how)[0], o)
    assert len(exact) == 1


def test_rows_of_no_sequence_are_0(exact):
    q, k, v = torch.randn(3, 1, 2, 12, 16)
    o, _ = room.attention(torch.nn.Identity(), q, k, v, None, **told([0, 5, 9], [0, 5, 9]))
    assert (o[:, 9:] == 0).all() and (o[:, :9] != 0).any(-1).all()


def test_of_several_rows_nothing_is_told(exact):
    q, k, v = torch.randn(3, 2, 2, 12, 16)
    room.attention(torch.nn.Identity(), q, k, v, None, **told([0, 5, 12], [0, 5, 12]))
    assert exact[0]["q"] is q and exact[0]["causal"]


def test_padding_comes_before_what_is_told(exact):
    q, k, v = (torch.randn(1, h, 37, 16) for h in (4, 2, 2))
    room.attention(torch.nn.Identity(), q, k, v, causal_mask(LEFT[1:2], 37)[0], **told([0, 20, 37], [0, 20, 37]))
    assert "mask_mod" in exact[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_packed_in_a_compiled_region(dtype, softcap, one_thread):
    """What is told is an operator of the graph, but for softcaps; a mask that must be read is sdpa's."""
    torch._dynamo.reset()
    module = transformers.models.gemma2.modeling_gemma2.Gemma2Attention(
        transformers.Gemma2Config(hidden_size=32, num_attention_heads=2, num_key_value_heads=2, head_dim=16), 0
    )
    how = dict(softcap=softcap, scaling=0.25)
    layer = torch.compile(
        lambda q, k, v, mask, **more: room.attention(module.eval(), q * 1, k, v, mask, **how, **more)[0],
        backend="aot_eager",
        fullgraph=True,
    )
    q, k, v = torch.randn(3, 1, 2, 67, 16).to(dtype)
    ours, bits = packed_mask(WHICH)
    want, _ = reference.attention(q, k, v, scale=0.25, softcap=softcap, mask_mod=lambda b, h, i, j: bits[b, 0, i, j])
    for found in (layer(q, k, v, ours), layer(q, k, v, None, **told(ENDS, ENDS))):
        atol = 16 * torch.finfo(dtype).eps
        torch.testing.assert_close(found.transpose(1, 2).double(), want, atol=atol, rtol=atol)


# On the GPU


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_padded_and_packed_on_the_gpu(family, monkeypatch):
    """Two chunks, steps, and packed, no worse than twice transformers' own, both against the weights in float32."""
    truth, ours, theirs = on_the_gpu(family, monkeypatch)
    seen = []
    for module, name in ((api, "flash_fwd"), (varlen, "flash_fwd_varlen")):
        monkeypatch.setattr(module, name, partial(_counted, getattr(module, name), seen))
    tokens = torch.randint(1, 199, (4, 333), device="cuda")
    places = torch.arange(333, device="cuda")
    real = places >= torch.tensor([0, 40, 150, 329], device="cuda")[:, None]
    positions = places - places // 90 * 90

    def answers(model):
        cache, parts, end = transformers.DynamicCache(config=model.config), [], 0
        for part in tokens.split([200, 130, 1, 1, 1], dim=1):
            end += part.shape[1]
            parts.append(logits(model, part, attention_mask=real[:, :end].long(), past_key_values=cache))
        packed = logits(model, tokens[:1], position_ids=positions[None], use_cache=False)
        return torch.cat([*parts, packed.expand(4, -1, -1)], dim=1)

    want, mine, other = (answers(model)[real.repeat(1, 2)] for model in (truth, ours, theirs))
    assert len(seen) == 2 * 6, "each part of each layer is ours"
    ulp = torch.finfo(torch.bfloat16).eps * want.abs().max()
    assert not mine.isnan().any()
    assert (mine - want).abs().max() <= 2 * (other - want).abs().max() + ulp
    if family not in EAGER:
        inputs = dict(input_ids=tokens[:1], position_ids=positions[None], labels=tokens[:1])
        want, mine, other = (weight_gradients(model, **inputs) for model in (truth, ours, theirs))
        assert (mine - want).norm() <= 2 * (other - want).norm()


@pytest.mark.gpu
@pytest.mark.parametrize("family", ENCODERS)
def test_padded_encoders_on_the_gpu(family, monkeypatch):
    """No worse than twice eager attention's in bf16, both against the weights in float32."""
    needs_encoders()
    truth = encoder_pair(family)[1].cuda()
    ours, theirs, windows = (
        x.cuda() if isinstance(x, torch.nn.Module) else x for x in encoder_pair(family, torch.bfloat16)
    )
    theirs.load_state_dict(truth.state_dict())
    ours.load_state_dict(truth.state_dict())
    seen = []
    monkeypatch.setattr(api, "flash_fwd", partial(_counted, api.flash_fwd, seen))
    tokens = torch.randint(1, 199, (4, 333), device="cuda")
    for starts, ends in (((0, 40, 150, 329), (333,) * 4), ((0,) * 4, (333, 300, 170, 3))):
        places = torch.arange(333, device="cuda")
        real = (places >= torch.tensor(starts, device="cuda")[:, None]) & (
            places < torch.tensor(ends, device="cuda")[:, None]
        )
        want, mine, other = (states(m, tokens, attention_mask=real.long()).float()[real] for m in (truth, ours, theirs))
        ulp = torch.finfo(torch.bfloat16).eps * want.abs().max()
        assert not mine.isnan().any() and (mine - want).abs().max() <= 2 * (other - want).abs().max() + ulp
    assert [call["window"] for call in seen] == windows * 2 and all("mask_mod" in call for call in seen)


def _counted(function, seen, *tensors, **how):
    seen.append(how)
    return function(*tensors, **how)
