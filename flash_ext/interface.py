"""The functions people call: thin layers over torch.ops.flash_ext.forward and general_forward."""

import functools

import torch

import flash_ext.extension  # noqa: F401  (registers the operators)

_forward = torch.ops.flash_ext.forward.default
_general_forward = torch.ops.flash_ext.general_forward.default

# The operator's names for the public values of `causal`.
CAUSAL_MODES = {False: "none", True: "bottom_right", "bottom_right": "bottom_right", "top_left": "top_left"}

# The arguments that make a call more than plain attention; the others say how.
GENERAL_ARGUMENTS = (
    "attn_mask", "window", "alibi_slopes", "softcap", "sinks", "dropout_p", "seqlens_k", "cu_seqlens_q",
    "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "block_mask",
)  # fmt: skip


def causal_mode(causal):
    """Return the operator's name for a public value of `causal`; raise ValueError for any other."""
    try:
        return CAUSAL_MODES[causal]
    except (KeyError, TypeError):
        raise ValueError(
            "flash_ext.flash_attention: causal must be False, True, 'bottom_right' or 'top_left', "
            f"got {causal!r}"
        ) from None


def flash_attention(
    q, k, v, *, causal=False, scale=None, return_lse=False, algorithm="auto", deterministic=None,
    attn_mask=None, window=None, alibi_slopes=None, softcap=0.0, sinks=None, dropout_p=0.0, rng_state=None,
    seqlens_k=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
    block_mask=None, block_size=128, validate=False,
):  # fmt: skip
    """Exact attention, ``softmax(mask(scale * q @ k.T)) @ v``, in memory linear in the sequence length.

    Differentiable once in q, k and v, through `out` and through `lse`. Works under autocast (as
    `scaled_dot_product_attention` does), torch.compile, torch.export and CUDA graphs.

    Args:
        q: (batch, heads, seqlen_q, head_dim), float16, bfloat16 or float32, on the CPU also float64.
            head_dim is 1 to 256. Any strides as long as the last dimension is dense, so that a
            (batch, seqlen, heads, head_dim) tensor goes in as `x.transpose(1, 2)` without a copy.
            A 3-D (batch, seqlen, head_dim) tensor is one head; k and v are then 3-D too.
        k, v: (batch, heads_kv, seqlen_k, head_dim) of q's dtype and device, where heads_kv divides
            heads: each key head serves heads / heads_kv neighbouring query heads.
        causal: False: every query sees every key. True or "bottom_right": the last query sees every
            key and each query before it one fewer. "top_left": query i sees the keys 0..i, as
            `scaled_dot_product_attention(is_causal=True)`. The two differ when seqlen_q != seqlen_k.
        scale: factor on q @ k.T, any finite number; default 1 / sqrt(head_dim).
        return_lse: also return the natural logarithm of each row's softmax denominator.
        algorithm: "v1" (FlashAttention), "v2" (FlashAttention-2), "v3" (FlashAttention-3, Hopper GPUs
            only), or "auto": the fastest that can run the call; see `explain`. It holds for the
            gradients too, for which v1 and v2 share their kernels.
        deterministic: True: the gradient of q is the same to the bit in every run (everything else
            always is). None: as `torch.are_deterministic_algorithms_enabled()` says when the gradient
            is computed; False cannot overrule that setting.
        attn_mask: bool (True: attend) or float (added to the scaled scores, of q's dtype or float32),
            broadcastable to (batch, heads, seqlen_q, seqlen_k), any strides. A float mask has a gradient,
            in its own shape.
        window: (left, right): how many keys a query sees on either side of the one that it stands at,
            -1 for all. Query i stands at key i + seqlen_k - seqlen_q (with "top_left" at key i).
        alibi_slopes: (heads) or (batch, heads): slope * distance is subtracted from the scores, the distance
            being that from the key where a query stands. They have gradients.
        softcap: scores become softcap * tanh(scores / softcap) before biases and masks; 0: they do not.
        sinks: (heads): one more logit for every row, which has no value. `lse` includes it. It has a gradient.
        dropout_p: how probable it is that a softmax weight is dropped, in steps of 2^-16; the others are
            divided by 1 - dropout_p. It holds whenever it is given: pass 0 in evaluation.
        rng_state: two int64 numbers on q's device that the mask of the dropout is a function of, with batch,
            head, row and column; default: drawn from torch's generator.
        seqlens_k: (batch), int32: the keys in use, the first ones of each batch entry.
        cu_seqlens_q, cu_seqlens_k: (batch + 1), int32: q is (total_q, heads, head_dim), k and v are (total_k,
            heads_kv, head_dim), and sequence b has the rows cu_seqlens[b] to cu_seqlens[b + 1]. lse is
            (heads, total_q). Rows of no sequence have out 0, lse -inf and gradients 0.
        max_seqlen_q, max_seqlen_k: with cu_seqlens: no sequence is longer; rows beyond are left out.
        block_mask: bool (batch or 1, heads or 1, blocks of queries, blocks of keys), True: attend. Blocks
            have block_size (64, 128 or 256) queries and keys; those that are off are skipped. See
            `block_mask_from_flex`.
        validate: raise if lengths are not well-formed, which waits for the device. Otherwise they are
            clamped there, so that nothing outside the tensors is read or written.

    Returns:
        out, of q's shape and dtype; or (out, lse) with lse (batch, heads, seqlen_q) in float32
        (float64 for float64 inputs). A query that sees no key has out 0, lse -inf and gradients 0.

    Raises:
        ValueError: `causal` or a rank is wrong.
        RuntimeError: another rule above is broken, or a CUDA call failed. The message names the
            argument, the rule and the value; nothing was launched and the next call works.

    Sources: FlashAttention, arXiv 2205.14135, Algorithm 1 (v1); FlashAttention-2, arXiv 2307.08691,
    Algorithms 1 (v2) and 2 (the gradients of all); FlashAttention-3, arXiv 2407.08608, Algorithm 2 (v3).
    """
    options = (scale, causal_mode(causal), algorithm, bool(deterministic))
    is_plain = (
        attn_mask is window is alibi_slopes is sinks is seqlens_k is block_mask is None
        and cu_seqlens_q is cu_seqlens_k is max_seqlen_q is max_seqlen_k is None
        and not softcap
        and not dropout_p
    )
    has_heads = q.dim() != 3 or cu_seqlens_q is not None
    if is_plain:
        out, lse = _forward(q, k, v, *options) if has_heads else _call(_forward, q, k, v, *options)
        return (out, lse) if return_lse else out
    if dropout_p and rng_state is None:
        rng_state = torch.randint(0, (1 << 63) - 1, (2,), device=q.device)
    if attn_mask is not None:
        attn_mask = as_4d(attn_mask, has_heads)
    call = _general_forward if has_heads else functools.partial(_call, _general_forward)
    out, lse = call(
        q, k, v, attn_mask, alibi_slopes, sinks, rng_state, seqlens_k, cu_seqlens_q, cu_seqlens_k, block_mask,
        block_size, max_seqlen_q, max_seqlen_k, (-1, -1) if window is None else window, softcap, dropout_p,
        *options, validate,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _call(operator, q, k, v, *options):
    """The operator on 3-D tensors, as of one head."""
    if k.dim() != 3 or v.dim() != 3:
        raise ValueError(
            f"flash_ext.flash_attention: k and v must have 3 dimensions like q, got {k.dim()} and {v.dim()}"
        )
    out, lse = operator(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), *options)
    return out.squeeze(1), lse.squeeze(1)


def as_4d(mask, has_heads):
    """(..., seqlen_q, seqlen_k) with the dimensions that broadcasting adds; a view."""
    if mask.dim() == 3 and not has_heads:
        return mask.unsqueeze(1)
    return mask[(None,) * (4 - mask.dim())] if mask.dim() < 4 else mask


def flash_attention_v1(q, k, v, **options):
    """`flash_attention` by FlashAttention's Algorithm 1 (arXiv 2205.14135): outer loop over keys."""
    return flash_attention(q, k, v, algorithm="v1", **options)


def flash_attention_v2(q, k, v, **options):
    """`flash_attention` by FlashAttention-2's Algorithm 1 (arXiv 2307.08691): outer loop over queries."""
    return flash_attention(q, k, v, algorithm="v2", **options)


def flash_attention_v3(q, k, v, **options):
    """`flash_attention` by FlashAttention-3's Algorithm 2 (arXiv 2407.08608): warps specialised for Hopper.

    Raises RuntimeError also where it cannot run: on another GPU than Hopper (compute capability 9.0), for
    float32, and for q, k or v whose rows do not begin at multiples of 16 bytes.
    """
    return flash_attention(q, k, v, algorithm="v3", **options)
