"""Exact attention in plain torch: the one reference that tests and benchmarks compare with.

It follows the definition, not the algorithm: scores, biases, mask, softmax, dropout, product. Query rows
are taken in chunks, recomputed in the backward pass, so memory grows linearly with the sequence length.
Gradients come from autograd.
"""

import torch
from torch.utils.checkpoint import checkpoint

from flash_ext.philox import dropout_factor

# Scores held at once by one chunk of query rows: 128 MiB in fp64.
_MAX_SCORES = 1 << 24


def attention_reference(
    q, k, v, *, causal=False, scale=None, attn_mask=None, window=(-1, -1), alibi_slopes=None, softcap=0.0,
    sinks=None, dropout_p=0.0, rng_state=None, seqlens_k=None, cu_seqlens_q=None, cu_seqlens_k=None,
    max_seqlen_q=None, max_seqlen_k=None, block_mask=None, block_size=128, dtype=torch.float64,
):  # fmt: skip
    """Return ``(out, lse)`` of ``softmax(mask(scale * q @ k.T)) @ v``, computed in and returned as `dtype`.

    q is (batch, heads, seqlen_q, head_dim); k and v may have fewer heads, dividing q's. 3-D inputs
    (batch, seqlen, head_dim) are one head. `causal` is False, True (the same as "bottom_right": the last
    query sees every key), "bottom_right" or "top_left" (query i sees keys 0..i). lse is the natural
    logarithm of the softmax denominator. A row that sees no key has out 0, lse -inf and gradients 0.
    The other arguments are those of `flash_attention`; lengths are taken to be well-formed.
    """
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    features = {
        "causal": causal, "scale": scale, "attn_mask": attn_mask, "window": window, "alibi_slopes": alibi_slopes,
        "softcap": softcap, "sinks": sinks, "dropout_p": dropout_p, "rng_state": rng_state,
        "seqlens_k": seqlens_k, "block_mask": block_mask, "block_size": block_size, "dtype": dtype,
    }  # fmt: skip
    if cu_seqlens_q is not None:
        return _packed(q, k, v, cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), features)
    if q.dim() == 3:
        if attn_mask is not None and attn_mask.dim() == 3:
            features["attn_mask"] = attn_mask.unsqueeze(1)
        out, lse = attention_reference(*(x.unsqueeze(1) for x in (q, k, v)), **features)
        return out.squeeze(1), lse.squeeze(1)
    if seqlens_k is not None:
        return _padded(q, k, v, seqlens_k.tolist(), features)
    return _dense(q, k, v, first_head=0, **features)


def _of_entry(features, batch_idx, heads):
    """The features of one batch entry alone, and the number of its first head for dropout."""
    features = dict(features, seqlens_k=None, first_head=batch_idx * heads)
    for name in ("attn_mask", "block_mask"):
        x = features[name]
        if x is not None and x.dim() == 4 and x.shape[0] > 1:
            features[name] = x[batch_idx : batch_idx + 1]
    slopes = features["alibi_slopes"]
    if slopes is not None and slopes.dim() == 2:
        features["alibi_slopes"] = slopes[batch_idx]
    return features


def _padded(q, k, v, lengths, features):
    parts = [
        _dense(q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n], **_of_entry(features, b, q.shape[1]))
        for b, n in enumerate(lengths)
    ]
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])


def _packed(q, k, v, cu_q, cu_k, features):
    """Each sequence by itself. Rows of none have out 0 and lse -inf."""
    total, heads, _ = q.shape
    dtype = features["dtype"]
    used = features["seqlens_k"]
    outs = [torch.zeros(cu_q[0], *q.shape[1:], dtype=dtype, device=q.device)]
    lses = [torch.full((heads, cu_q[0]), float("-inf"), dtype=dtype, device=q.device)]
    for b, (q0, q1, k0, k1) in enumerate(zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False)):
        k1 = k1 if used is None else k0 + int(used[b])
        parts = (x.transpose(0, 1).unsqueeze(0) for x in (q[q0:q1], k[k0:k1], v[k0:k1]))
        out, lse = _dense(*parts, **_of_entry(features, b, heads))
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    outs.append(torch.zeros(total - cu_q[-1], *q.shape[1:], dtype=dtype, device=q.device))
    lses.append(torch.full((heads, total - cu_q[-1]), float("-inf"), dtype=dtype, device=q.device))
    return torch.cat(outs), torch.cat(lses, dim=1)


def _dense(
    q, k, v, *, causal, scale, attn_mask, window, alibi_slopes, softcap, sinks, dropout_p, rng_state, seqlens_k,
    block_mask, block_size, dtype, first_head,
):  # fmt: skip
    batch, heads, seqlen_q, head_dim = q.shape
    seqlen_k = k.shape[2]
    if scale is None:
        scale = head_dim**-0.5
    group = heads // max(1, k.shape[1])
    q, k, v = q.to(dtype), k.to(dtype).repeat_interleave(group, 1), v.to(dtype).repeat_interleave(group, 1)
    diagonal = _diagonal(causal, seqlen_q, seqlen_k)
    left, right = window
    right = 0 if causal is not False else right
    key = torch.arange(seqlen_k, device=q.device)

    def attend(q, begin, end, *biases):
        mask, slopes, sink = biases
        distance = torch.arange(begin, end, device=q.device)[:, None] + diagonal - key
        scores = scale * (q @ k.mT)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if slopes is not None:
            scores = scores - slopes.to(dtype)[..., None, None] * distance.abs()
        visible = torch.ones_like(distance, dtype=torch.bool)
        if left >= 0:
            visible = visible & (distance <= left)
        if right >= 0:
            visible = visible & (distance >= -right)
        if mask is not None:
            mask = (mask[..., begin:end, :] if mask.shape[-2] > 1 else mask)[..., :seqlen_k]
            if mask.dtype == torch.bool:
                visible = visible & mask
            else:
                visible = visible & (mask != float("-inf"))
                scores = scores + mask.to(dtype).masked_fill(mask == float("-inf"), 0.0)
        if block_mask is not None:
            rows = torch.arange(begin, end, device=q.device) // block_size
            visible = visible & block_mask[..., rows, :][..., key // block_size]
        weights = None
        if dropout_p:
            last_head = first_head + batch * heads
            weights = dropout_factor(dropout_p, rng_state, 1, last_head, range(begin, end), seqlen_k)
            weights = weights[0, first_head:].view(batch, heads, end - begin, seqlen_k).to(dtype)
        return _softmax_product(scores, visible, sink, weights, v)

    rows = max(1, _MAX_SCORES // max(1, batch * heads * seqlen_k))
    chunks = []
    for begin in range(0, max(1, seqlen_q), rows):
        end = min(begin + rows, seqlen_q)
        args = (q[..., begin:end, :], begin, end, attn_mask, alibi_slopes, sinks)
        if seqlen_q <= rows:
            chunks.append(attend(*args))
        else:
            chunks.append(checkpoint(attend, *args, use_reentrant=False))
    return torch.cat([out for out, _ in chunks], dim=-2), torch.cat([lse for _, lse in chunks], dim=-1)


def _softmax_product(scores, visible, sink, factor, v):
    # Rows without a key go through the softmax with zero scores and are overwritten afterwards: -inf
    # everywhere would make NaN gradients.
    empty = ~visible.any(dim=-1)
    scores = scores.masked_fill(~visible & ~empty[..., None], float("-inf"))
    scores = scores.masked_fill(empty[..., None], 0.0)
    if sink is None:
        weights = torch.softmax(scores, dim=-1)
        lse = torch.logsumexp(scores, dim=-1).masked_fill(empty, float("-inf"))
    else:
        sink = sink.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], dim=-1)
        weights = torch.softmax(scores, dim=-1)[..., :-1]
        lse = torch.where(empty, sink[..., 0], torch.logsumexp(scores, dim=-1))
    weights = weights.masked_fill(empty[..., None], 0.0)
    return (weights if factor is None else weights * factor) @ v, lse


def _diagonal(causal, seqlen_q, seqlen_k):
    """Query i stands at key i + this."""
    if causal is False or causal is True or causal == "bottom_right":
        return seqlen_k - seqlen_q
    if causal == "top_left":
        return 0
    raise ValueError(f"causal must be False, True, 'bottom_right' or 'top_left', got {causal!r}")
