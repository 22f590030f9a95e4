"""The functions people call: thin layers over torch.ops.flash_ext.forward."""

import torch

import flash_ext.extension  # noqa: F401  (registers the operators)

_forward = torch.ops.flash_ext.forward.default

# The operator's names for the public values of `causal`.
CAUSAL_MODES = {False: "none", True: "bottom_right", "bottom_right": "bottom_right", "top_left": "top_left"}


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
    q, k, v, *, causal=False, scale=None, return_lse=False, algorithm="auto", deterministic=None
):
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
    if q.dim() == 3:
        if k.dim() != 3 or v.dim() != 3:
            raise ValueError(
                "flash_ext.flash_attention: k and v must have 3 dimensions like q, "
                f"got {k.dim()} and {v.dim()}"
            )
        q, k, v = q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)
        out, lse = _forward(q, k, v, scale, causal_mode(causal), algorithm, bool(deterministic))
        out, lse = out.squeeze(1), lse.squeeze(1)
    else:
        out, lse = _forward(q, k, v, scale, causal_mode(causal), algorithm, bool(deterministic))
    return (out, lse) if return_lse else out


def flash_attention_v1(q, k, v, *, causal=False, scale=None, return_lse=False, deterministic=None):
    """`flash_attention` by FlashAttention's Algorithm 1 (arXiv 2205.14135): outer loop over keys."""
    return flash_attention(
        q, k, v, causal=causal, scale=scale, return_lse=return_lse, algorithm="v1",
        deterministic=deterministic,
    )  # fmt: skip


def flash_attention_v2(q, k, v, *, causal=False, scale=None, return_lse=False, deterministic=None):
    """`flash_attention` by FlashAttention-2's Algorithm 1 (arXiv 2307.08691): outer loop over queries."""
    return flash_attention(
        q, k, v, causal=causal, scale=scale, return_lse=return_lse, algorithm="v2",
        deterministic=deterministic,
    )  # fmt: skip


def flash_attention_v3(q, k, v, *, causal=False, scale=None, return_lse=False, deterministic=None):
    """`flash_attention` by FlashAttention-3's Algorithm 2 (arXiv 2407.08608): warps specialised for Hopper.

    Raises RuntimeError also where it cannot run: on another GPU than Hopper (compute capability 9.0), for
    float32, and for q, k or v whose rows do not begin at multiples of 16 bytes.
    """
    return flash_attention(
        q, k, v, causal=causal, scale=scale, return_lse=return_lse, algorithm="v3",
        deterministic=deterministic,
    )  # fmt: skip
