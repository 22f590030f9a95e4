"""Exact attention in plain torch: the one reference that tests and benchmarks compare with.

It follows the definition, not the algorithm: scores, mask, softmax, product. Query rows are taken in
chunks, recomputed in the backward pass, so memory grows linearly with the sequence length. Gradients
come from autograd.
"""

import torch
from torch.utils.checkpoint import checkpoint

# Scores held at once by one chunk of query rows: 128 MiB in fp64.
_MAX_SCORES = 1 << 24


def attention_reference(q, k, v, *, causal=False, scale=None, dtype=torch.float64):
    """Return ``(out, lse)`` of ``softmax(mask(scale * q @ k.T)) @ v``, computed in and returned as `dtype`.

    q is (batch, heads, seqlen_q, head_dim); k and v may have fewer heads, dividing q's. 3-D inputs
    (batch, seqlen, head_dim) are one head. `causal` is False, True (the same as "bottom_right": the last
    query sees every key), "bottom_right" or "top_left" (query i sees keys 0..i). lse is the natural
    logarithm of the softmax denominator. A row that sees no key has out 0, lse -inf and gradients 0.
    """
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    if q.dim() == 3:
        heads_of_one = (x.unsqueeze(1) for x in (q, k, v))
        out, lse = attention_reference(*heads_of_one, causal=causal, scale=scale, dtype=dtype)
        return out.squeeze(1), lse.squeeze(1)

    batch, heads, seqlen_q, head_dim = q.shape
    heads_kv, seqlen_k = k.shape[1], k.shape[2]
    if scale is None:
        scale = head_dim**-0.5
    diagonal = _last_visible_key_of_row_0(causal, seqlen_q, seqlen_k)

    # (batch, heads_kv, group, seqlen, head_dim): each key head broadcasts over its group of query heads.
    q = q.to(dtype).unflatten(1, (heads_kv, heads // max(1, heads_kv)))
    k, v = k.to(dtype).unsqueeze(2), v.to(dtype).unsqueeze(2)

    rows = max(1, _MAX_SCORES // max(1, batch * heads * seqlen_k))
    chunks = []
    for begin in range(0, max(1, seqlen_q), rows):
        args = (q[..., begin : begin + rows, :], k, v, scale, None if diagonal is None else diagonal + begin)
        if seqlen_q <= rows:
            chunks.append(_attend(*args))
        else:
            chunks.append(checkpoint(_attend, *args, use_reentrant=False))
    out = torch.cat([out for out, _ in chunks], dim=-2)
    lse = torch.cat([lse for _, lse in chunks], dim=-1)
    return out.reshape(batch, heads, seqlen_q, head_dim), lse.reshape(batch, heads, seqlen_q)


def _last_visible_key_of_row_0(causal, seqlen_q, seqlen_k):
    """Row i sees the keys 0..i + this; None means that every row sees every key."""
    if causal is False:
        return None
    if causal is True or causal == "bottom_right":
        return seqlen_k - seqlen_q
    if causal == "top_left":
        return 0
    raise ValueError(f"causal must be False, True, 'bottom_right' or 'top_left', got {causal!r}")


def _attend(q, k, v, scale, diagonal):
    scores = scale * (q @ k.mT)
    seqlen_q, seqlen_k = scores.shape[-2:]
    visible = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=q.device)
    if diagonal is not None:
        visible = visible.tril(diagonal)
    empty = ~visible.any(dim=-1)

    # Rows without a key go through the softmax with zero scores and are overwritten afterwards: -inf
    # everywhere would make NaN gradients.
    scores = scores.masked_fill(~visible & ~empty[:, None], float("-inf"))
    weights = torch.softmax(scores, dim=-1).masked_fill(empty[:, None], 0.0)
    lse = torch.logsumexp(scores, dim=-1).masked_fill(empty, float("-inf"))
    return weights @ v, lse
