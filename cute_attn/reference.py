"""Attention and its gradients by definition, in float32 or float64: the truth for tests, and what CPU tensors get."""

import math
from functools import partial
from itertools import pairwise, product

import torch

CHUNK_BYTES = 256 << 20  # of scores held at a time
LEVELS = 1 << 16  # of the 16 random bits by which an entry is kept or not
WORD = 0xFFFFFFFF


def attention(
    q,
    k,
    v,
    *,
    causal=False,
    scale=None,
    window=None,
    attention_chunk=None,
    spans=None,
    draft_mask=None,
    softcap=None,
    alibi_slopes=None,
    sinks=None,
    score_mod=None,
    mask_mod=None,
    layout="bhsd",
    dtype=torch.float64,
    return_row_max=False,
    return_max_logit=False,
    dropout_p=0.0,
    rng_state=None,
):
    """softmax(scale q k^T) v over every (query, key) pair that the mask leaves, all in `dtype`.

    q (B, H, Sq, D), k (B, Hk, Sk, D) and v (B, Hk, Sk, Dv) with Hk dividing H; layout "bshd" swaps the two middle
    dimensions. causal is aligned to the last key, and so is window, (left, right): query i sees the keys from
    i + Sk - Sq - left to i + Sk - Sq + right, None being no bound. attention_chunk, spans, draft_mask, softcap,
    alibi_slopes, sinks, score_mod and mask_mod as of `flash_fwd`. With dropout_p weights are left out where `keep_mask`
    does not hold, and the others scaled up; lse is without. Returns o (B, H, Sq, Dv) and lse (B, H, Sq), natural log,
    both in `dtype`. A row whose every score is -inf, which no visible key implies, gives o = 0 and lse = -inf, or its
    sink. Where asked for, each row's largest score (B, H, Sq) and each head's (H,) follow, no sinks among them, and
    -inf where there is no score.
    """
    if layout == "bshd":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    batch, heads, seqlen_q, head_dim = q.shape
    seqlen_k, ratio = k.shape[2], heads // max(k.shape[1], 1)
    scale = head_dim**-0.5 if scale is None else scale
    o = torch.empty((*q.shape[:3], v.shape[3]), dtype=dtype, device=q.device)
    lse, row_max = (torch.empty(q.shape[:3], dtype=dtype, device=q.device) for _ in range(2))
    rows = max(1, CHUNK_BYTES // (max(seqlen_k, 1) * dtype.itemsize))
    for b in range(batch):
        for h in range(heads):
            keys, values = k[b, h // ratio].to(dtype), v[b, h // ratio].to(dtype)
            for start in range(0, seqlen_q, rows):
                part = slice(start, start + rows)
                queries = q[b, h, part].to(dtype)
                last = torch.arange(start, start + len(queries), device=q.device)[:, None] + seqlen_k - seqlen_q
                seen = _seen(last, seqlen_k, causal, window, attention_chunk, None if spans is None else spans[b])
                drafts = None if draft_mask is None else draft_mask[b, part]
                change = partial(_changed, b, h, start, seqlen_q, softcap, alibi_slopes, score_mod, mask_mod, drafts)
                sink = None if sinks is None else sinks[h].to(dtype)
                thin = None if dropout_p == 0 else partial(_thinned, rng_state, dropout_p, b * heads + h, start)
                found = _rows(queries, keys, values, scale, seen, change, sink, thin)
                o[b, h, part], lse[b, h, part], row_max[b, h, part] = found
    o = o.transpose(1, 2) if layout == "bshd" else o
    return o, lse, *maxima(row_max, return_row_max, return_max_logit)


def merge_states(o, lse, *, layout="bhsd", base2=False, dtype=torch.float64):
    """As `cute_attn.merge_states`, in `dtype`: o and lse of all keys, of states that each have seen some of them."""
    lse = torch.stack([x.to(dtype) for x in lse])
    merged = 0
    for x, share, empty in zip(o, shares(lse, base2), lse.isinf(), strict=True):
        merged = merged + of_rows(share, layout) * x.to(dtype).masked_fill(of_rows(empty, layout), 0)
    return merged, (lse.masked_fill(lse.isinf(), -torch.inf) * unit(base2)).logsumexp(0) / unit(base2)


def shares(lse, base2):
    """(k, ...) of lse (k, ...): the states' weights, which together are 1, or 0 where every lse is infinite."""
    empty = lse.isinf()
    return (lse.masked_fill(empty, -torch.inf) * unit(base2)).softmax(0).masked_fill(empty, 0)


def unit(base2) -> float:
    """What makes natural logarithms of lse."""
    return math.log(2) if base2 else 1.0


def of_rows(x, layout):
    """lse's like, (..., H, S) or (..., H, total), beside o."""
    return (x if layout == "bhsd" else x.transpose(-1, -2)).unsqueeze(-1)


def maxima(row_max, return_row_max, return_max_logit, packed=False) -> list[torch.Tensor]:
    """Of row_max (B, H, Sq), or packed (H, total_q), what is asked for: itself, each head's maximum."""
    found = [row_max] if return_row_max else []  # a list: torch 2.11 compiles no generator here
    if return_max_logit:
        others = (1,) if packed else (0, 2)
        if isinstance(row_max, torch.fx.Proxy) or row_max.numel():
            found.append(row_max.amax(others))
        else:
            found.append(row_max.new_full((row_max.shape[0 if packed else 1],), -torch.inf))
    return found


def levels_kept(p):
    """Of LEVELS, those by which dropout of probability p, rounded to 1 / LEVELS, keeps an entry."""
    return LEVELS - round(p * LEVELS)


def keep_mask(rng_state, p, batch, heads, seqlen_q, seqlen_k):
    """(B, H, Sq, Sk) bool: the weights that dropout of probability p keeps, by rng_state, (2,) int64: seed and offset.

    That of an entry depends on rng_state, p and its own four places alone, and on H.
    """
    rows = torch.arange(seqlen_q, device=rng_state.device)
    every = [_kept(rng_state, p, i, rows, seqlen_k) for i in range(batch * heads)]
    shape = batch, heads, seqlen_q, seqlen_k
    return torch.stack(every).view(shape) if every else rows.new_empty(shape, dtype=torch.bool)


def philox(counter, key):
    """Philox4x32-10 (Salmon et al., SC'11): four words of a counter of four and a key of two, ints or int64 tensors."""
    a, b, c, d = counter
    k, l = key
    for _ in range(10):
        left, right = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = ((right >> 32) & WORD) ^ b ^ k, right & WORD, ((left >> 32) & WORD) ^ d ^ l, left & WORD
        k, l = (k + 0x9E3779B9) & WORD, (l + 0xBB67AE85) & WORD
    return a, b, c, d


def _kept(rng_state, p, head, rows, seqlen_k):
    """(rows, Sk) bool, of the head-th of all sequences' heads.

    Of 32 keys 8i + 2t and 8i + 2t + 1 have the two halves of word i of their t-th counter.
    """
    seed, offset = ((x & WORD, (x >> 32) & WORD) for x in rng_state)
    key = philox((*offset, 0, 0), seed)[:2]
    places = torch.arange(-(-seqlen_k // 32) * 4, device=rows.device)
    words = torch.stack(torch.broadcast_tensors(*philox((places, rows[:, None], head, 0), key)), dim=-1)
    bits = torch.stack((words & 0xFFFF, words >> 16), dim=-1).view(len(rows), -1, 4, 4, 2)  # which 32, t, i, half
    return bits.transpose(2, 3).reshape(len(rows), -1)[:, :seqlen_k] < levels_kept(p)


def _thinned(rng_state, p, head, start, weights):
    """Weights (rows, Sk) of the queries from `start` on, after dropout."""
    rows, kept = torch.arange(start, start + len(weights), device=weights.device), levels_kept(p)
    scale = LEVELS / kept if kept else 0.0
    return weights * _kept(rng_state, p, head, rows, weights.shape[1]).to(weights.dtype) * scale


def gradients(grad, q, k, v, *, causal=False, scale=None, window=None, layout="bhsd", dtype=torch.float64):
    """Of `attention`'s o: (dq, dk, dv), like q, k, v and in `dtype`, where `grad` is o's. A row without keys adds 0."""
    if layout == "bshd":
        swapped = (x.transpose(1, 2) for x in (grad, q, k, v))
        found = gradients(*swapped, causal=causal, scale=scale, window=window, dtype=dtype)
        return tuple(x.transpose(1, 2) for x in found)
    batch, heads, seqlen_q, head_dim = q.shape
    seqlen_k, ratio = k.shape[2], heads // max(k.shape[1], 1)
    scale = head_dim**-0.5 if scale is None else scale
    dq, dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q, k, v))
    rows = max(1, CHUNK_BYTES // (max(seqlen_k, 1) * dtype.itemsize))
    for b, h in product(range(batch), range(heads if seqlen_k else 0)):
        keys, values = k[b, h // ratio].to(dtype), v[b, h // ratio].to(dtype)
        for start in range(0, seqlen_q, rows):
            part = slice(start, start + rows)
            queries, do = q[b, h, part].to(dtype), grad[b, h, part].to(dtype)
            place = torch.arange(start, start + len(do), device=q.device)[:, None] + seqlen_k - seqlen_q
            s = _scores(queries, keys, scale, _seen(place, seqlen_k, causal, window, None, None))
            p = s.softmax(dim=1).masked_fill(s.amax(dim=1, keepdim=True) == -torch.inf, 0.0)
            dp = do @ values.T
            ds = scale * p * (dp - (p * dp).sum(dim=1, keepdim=True))
            dq[b, h, part] = ds @ keys
            dk[b, h // ratio] += ds.T @ queries
            dv[b, h // ratio] += p.T @ do
    return dq, dk, dv


def parts(cu_seqlens, seqused, total):
    """The rows of each varlen sequence: slices of `total` rows, within them whatever cu_seqlens and seqused say."""
    starts = cu_seqlens.tolist()
    lengths = [b - a for a, b in pairwise(starts)] if seqused is None else seqused.tolist()
    for start, length in zip(starts, lengths, strict=False):
        start = min(max(start, 0), total)
        yield slice(start, start + max(min(length, total - start), 0))


def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, *, seqused_q=None, seqused_k=None, **how):
    """`attention` for varlen q (total_q, H, D), k and v (total_k, Hk, D): of each sequence its rows, o (s, H, D) and
    lse (H, s), and row_max where asked for. `how` is `attention`'s, but for layout and dropout; b is which sequence.
    """
    queries, keys = parts(cu_seqlens_q, seqused_q, len(q)), parts(cu_seqlens_k, seqused_k, len(k))
    for n, (a, b) in enumerate(zip(queries, keys, strict=True)):
        found = attention(q[None, a], k[None, b], v[None, b], layout="bshd", **_of_sequence(n, a, b, **how))
        yield a, *(x[0] for x in found)


def kvcache(
    q,
    k_cache,
    v_cache,
    cache_seqlens,
    *,
    page_table=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    cu_seqlens_q=None,
    causal=False,
    **how,
):
    """`attention` over caches, as `flash_fwd_kvcache` takes them. Of each sequence: b, or with cu_seqlens_q the slice
    of its rows in q; o (s, H, Dv); lse (H, s), and row_max where asked for. `how` is `attention`'s, but for layout and
    dropout; causal may be of each sequence, (B,).

    Raises:
        ValueError: a page, or a row of the cache, is none.
    """
    places = range(len(q)) if cu_seqlens_q is None else parts(cu_seqlens_q, None, len(q))
    for n, place in enumerate(places):
        length = int(cache_seqlens[n] if isinstance(cache_seqlens, torch.Tensor) else cache_seqlens)
        own = dict(_of_sequence(n, place, None, **how), causal=causal)
        if isinstance(causal, torch.Tensor):
            own["causal"] = bool(causal[n])
        k, v = (cached(x, n, length, page_table, cache_batch_idx, cache_leftpad) for x in (k_cache, v_cache))
        found = attention(q[None, place], k[None], v[None], layout="bshd", **own)
        yield place, *(x[0] for x in found)


def cached(cache, n, length, page_table=None, cache_batch_idx=None, cache_leftpad=None):
    """The n-th sequence's rows of a cache, (keys, Hk, D), where its part of the cache holds `length` rows."""
    capacity = cache.shape[1] * (1 if page_table is None else page_table.shape[1])
    length = min(max(length, 0), capacity)
    if page_table is None:
        row = n if cache_batch_idx is None else int(cache_batch_idx[n])
        first = 0 if cache_leftpad is None else min(max(int(cache_leftpad[n]), 0), length)
        return cache[_one_of(len(cache), row, "cache_batch_idx", n), first:length]
    pages = page_table[n, : -(-length // max(cache.shape[1], 1))].tolist()
    pages = [_one_of(len(cache), page, "page_table", n) for page in pages]
    return cache[pages].flatten(0, 1)[:length]


def _one_of(count, place, name, n):
    if not 0 <= place < count:
        raise ValueError(f"{name}: {place} came for sequence {n}; from 0 to {count - 1} lie in the cache")
    return place


def _of_sequence(n, a, b, alibi_slopes=None, score_mod=None, mask_mod=None, spans=None, draft_mask=None, **how):
    """For `attention` of the n-th sequence alone, which is the 0-th there; a, b: its rows, where they are packed."""
    if spans is not None:
        how["spans"] = (spans[n] if spans.dim() == 3 else spans[b])[None]
    if draft_mask is not None:
        how["draft_mask"] = (draft_mask[n] if draft_mask.dim() == 3 else draft_mask[a])[None]
    if alibi_slopes is not None:
        how["alibi_slopes"] = alibi_slopes if alibi_slopes.dim() == 1 else alibi_slopes[n]
    if score_mod is not None:
        how["score_mod"] = lambda s, b, h, q_idx, kv_idx: score_mod(s, b + n, h, q_idx, kv_idx)
    if mask_mod is not None:
        how["mask_mod"] = lambda b, h, q_idx, kv_idx: mask_mod(b + n, h, q_idx, kv_idx)
    return how


def varlen_gradients(grad, q, k, v, cu_seqlens_q, cu_seqlens_k, **how):
    """Of `varlen`'s o: (dq, dk, dv), 0 in the rows of no sequence."""
    dtype = how.get("dtype", torch.float64)
    found = [torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q, k, v)]
    queries, keys = parts(cu_seqlens_q, None, len(q)), parts(cu_seqlens_k, None, len(k))
    for a, b in zip(queries, keys, strict=True):
        here = gradients(grad[None, a], q[None, a], k[None, b], v[None, b], layout="bshd", **how)
        for total, rows, dx in zip(found, (a, b, b), here, strict=True):
            total[rows] += dx[0]
    return tuple(found)


def _seen(place, seqlen_k, causal, window, chunk, spans):
    """The first and the last key that a row at each place (rows, 1) sees; None: no bound."""
    left, right = window or (None, None)
    right = 0 if causal else right
    first, last = None if left is None else place - left, None if right is None else place + right
    if chunk is not None:
        first = place.div(chunk, rounding_mode="floor") * chunk
        last = first + chunk - 1 if last is None else last
    if spans is not None and seqlen_k:
        there = (place >= 0) & (place < min(len(spans), seqlen_k))
        span = spans[place[:, 0].clamp(0, len(spans) - 1)]
        last = torch.where(there, torch.maximum(last, span[:, 1:] - 1), last)
        first = None if first is None else torch.where(there, torch.minimum(first, span[:, :1]), first)
    return first, last


def drafted(words, seqlen_q, seqlen_k):
    """(rows, Sk): whether each row's bits (rows, words) let it see a key; all but the last Sq are seen."""
    n = torch.arange(seqlen_k, device=words.device) - (seqlen_k - seqlen_q)
    bits = words[:, (n.clamp(min=0) // 32).clamp(max=words.shape[1] - 1)] >> (n.clamp(min=0) % 32) & 1
    return (n < 0) | ((bits != 0) & (n < 32 * words.shape[1]))


def _changed(b, h, start, seqlen_q, softcap, alibi_slopes, score_mod, mask_mod, drafts, s):
    """Scaled scores (rows, Sk) of the queries from `start` on, with all that changes them."""
    rows, columns = (torch.arange(n, device=s.device) for n in s.shape)
    rows = rows[:, None] + start
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    if alibi_slopes is not None:
        slope = alibi_slopes[h] if alibi_slopes.dim() == 1 else alibi_slopes[b, h]
        s = s - slope.to(s.dtype) * (rows + s.shape[1] - seqlen_q - columns).abs()
    places = *(torch.tensor(x, device=s.device) for x in (b, h)), rows, columns
    if score_mod is not None:
        s = torch.as_tensor(score_mod(s, *places), dtype=s.dtype, device=s.device).expand_as(s)
    if drafts is not None:
        s = s.masked_fill(~drafted(drafts, seqlen_q, s.shape[1]), -torch.inf)
    return s if mask_mod is None else s.masked_fill(~_truths(mask_mod(*places), s.device).expand_as(s), -torch.inf)


def _truths(mask, device) -> torch.Tensor:
    found = torch.as_tensor(mask, device=device)
    if found.dtype != torch.bool:
        raise TypeError(f"mask_mod: its result is {found.dtype}; torch.bool is needed: say which attend, as by `!= 0`")
    return found


def _scores(q, k, scale, seen, change=lambda s: s):
    s, (first, last) = change((q @ k.T) * scale), seen
    keys = torch.arange(s.shape[1], device=s.device)
    if first is not None:
        s.masked_fill_(keys < first, -torch.inf)
    return s if last is None else s.masked_fill_(keys > last, -torch.inf)


def _rows(q, k, v, scale, seen, change, sink, thin):
    s = _scores(q, k, scale, seen, change)
    none = s.new_full((s.shape[0], 1), -torch.inf)
    s = torch.cat((s, none if sink is None else sink.expand_as(none)), dim=1)  # as the score of one more key
    top = s.amax(dim=1, keepdim=True)
    row_max = s[:, :-1].amax(dim=1, keepdim=True) if s.shape[1] > 1 else none
    p = torch.exp(s - top.masked_fill(top == -torch.inf, 0.0))
    total = p.sum(dim=1, keepdim=True)
    weights = p[:, :-1] / total
    o = ((weights if thin is None else thin(weights)) @ v).masked_fill(row_max == -torch.inf, 0.0)
    return o, (top + total.log()).squeeze(1), row_max.squeeze(1)


def rotated(x, cos, sin, positions, interleaved):
    """x (T, H, D), whose first R columns are turned by each token's row of cos and sin (places, R / 2): RoPE. Computed
    in float32 and rounded once; positions end with the table.
    """
    at = positions.long().clamp(0, len(cos) - 1)
    c, s = (t.float()[at][:, None] for t in (cos, sin))  # (T, 1, R / 2)
    turned, rest = x.float().split([2 * c.shape[-1], x.shape[-1] - 2 * c.shape[-1]], dim=-1)
    if interleaved:
        a, b = turned.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((a * c - b * s, a * s + b * c), dim=-1).flatten(-2)
    else:
        a, b = turned.chunk(2, dim=-1)
        turned = torch.cat((a * c - b * s, a * s + b * c), dim=-1)
    return torch.cat((turned, rest), dim=-1).to(x.dtype)


def append(k, v, k_cache, v_cache, slots):
    """k and v (T, Hk, D) into the slots of a cache (pages, page_size, Hk, D); those that are none are passed over."""
    page_size = k_cache.shape[1]
    there = (slots >= 0) & (slots < len(k_cache) * page_size)
    at = slots[there] // max(page_size, 1), slots[there] % max(page_size, 1)
    k_cache[at], v_cache[at] = k[there], v[there]


def next_slots(members, seqlens, capacity, page_size, *, page_table=None, cache_batch_idx=None):
    """Of new tokens, `members`, their slots behind the rows that each sequence has; -1 beyond what it can have."""
    found = []
    for b, number in members:
        row = max(int(seqlens[b]), 0) + number
        if b < 0 or row >= capacity:
            found.append(-1)
        elif page_table is None:
            page = b if cache_batch_idx is None else int(cache_batch_idx[b])
            found.append(page * page_size + row if page >= 0 else -1)
        else:
            page = int(page_table[b, row // page_size])
            found.append(page * page_size + row % page_size if page >= 0 else -1)
    return torch.tensor(found, dtype=torch.int64)


def members(total, cu_seqlens=None, each=0):
    """Of rows one behind the other: each one's sequence, -1 where it is in none, and its number there."""
    if cu_seqlens is None:
        return [divmod(i, max(each, 1)) for i in range(total)]
    found = [(-1, 0)] * total
    for b, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        found[start:end] = [(b, i) for i in range(end - start)]
    return found
