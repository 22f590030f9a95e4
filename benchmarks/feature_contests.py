"""Who is timed against whom with the arguments of general attention: contests, and what each is to show.

The contenders are flash_ext with an argument ("auto": what a user gets), plain v3 on the same shape, and what
torch offers for the same: SDPA's backends, and FlexAttention, compiled.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.cases import PASSES
from flash_ext import flash_attention

DTYPE = torch.bfloat16
SDPA = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class Entry:
    """A contender: `run(*leaves)` gives the output, for `visible` scores of each head, over the whole batch."""

    run: Callable
    leaves: tuple[torch.Tensor, ...]  # those that the backward differentiates by
    visible: int
    reference: Callable | None = None  # what must come out, within bf16's errors


@dataclass(frozen=True)
class Promise:
    """`ours` is to be `at_least` so many times as fast as the fastest of `over`."""

    ours: str
    over: tuple[str, ...]
    at_least: dict[str, float]  # by pass
    per_flop: bool = False  # the rates are compared, not the times


@dataclass(frozen=True)
class Contest:
    name: str
    shape: str
    heads: int
    head_dim: int
    entries: dict[str, Entry]
    promises: tuple[Promise, ...] = ()
    passes: tuple[str, ...] = field(default=PASSES)


def _both(ratio):
    return dict.fromkeys(PASSES, ratio)


def _qkv(batch, heads, seqlen, head_dim, heads_kv=None, layout="bhsd"):
    def tensor(n):
        x = torch.randn((batch, n, seqlen, head_dim), device="cuda", dtype=DTYPE)
        return x if layout == "bhsd" else x.transpose(1, 2).contiguous().transpose(1, 2)

    return tuple(tensor(n) for n in (heads, heads_kv or heads, heads_kv or heads))


def _ours(leaves, visible, **arguments):
    """flash_ext as "auto" chooses, checked against v2's kernels, which the tests hold to fp64."""
    if "dropout_p" in arguments:
        arguments["rng_state"] = torch.tensor([1, 2], device="cuda")
    run = functools.partial(flash_attention, **arguments)
    return Entry(run, leaves, visible, functools.partial(run, algorithm="v2"))


def _plain(leaves, visible, causal):
    return Entry(functools.partial(flash_attention, causal=causal, algorithm="v3"), leaves, visible)


def _sdpa(name, leaves, visible, reference=None, **arguments):
    def run(q, k, v, *mask):
        given = {"attn_mask": mask[0]} if mask else {}
        with sdpa_kernel(SDPA[name]):
            return F.scaled_dot_product_attention(q, k, v, **given, **arguments)

    return Entry(run, leaves, visible, reference)


# Every kind of call is a compilation of the same function; beyond this many torch runs it uncompiled.
torch._dynamo.config.recompile_limit = 64


def _flex(leaves, visible, reference, score_mod=None, block_mask=None, sinks=None):
    compiled = torch.compile(flex_attention, dynamic=False)

    def run(q, k, v):
        if sinks is None:
            return compiled(q, k, v, score_mod=score_mod, block_mask=block_mask)
        out, lse = compiled(q, k, v, score_mod=score_mod, block_mask=block_mask, return_lse=True)
        return out * torch.sigmoid(lse - sinks.view(1, -1, 1)).to(out.dtype).unsqueeze(-1)

    return Entry(run, leaves, visible, reference)


def _block_mask(mask_mod, seqlen):
    return create_block_mask(mask_mod, None, None, seqlen, seqlen, device="cuda")


def score_features(head_dim, with_flex):
    """softcap, ALiBi and sinks, causal, beside the same by FlexAttention."""
    batch, heads, seqlen = 4, 16, 4096
    leaves = _qkv(batch, heads, seqlen, head_dim)
    visible = batch * seqlen * (seqlen + 1) // 2
    slopes = torch.exp2(-8.0 * torch.arange(1, heads + 1, device="cuda") / heads)
    sinks = torch.randn(heads, device="cuda")
    arguments = {"softcap": {"softcap": 30.0}, "alibi_slopes": {"alibi_slopes": slopes}, "sinks": {"sinks": sinks}}
    entries = {"v3, plain": _plain(leaves, visible, True)}
    entries |= {name: _ours(leaves, visible, causal=True, **given) for name, given in arguments.items()}
    promises = [Promise(name, ("v3, plain",), {"forward": 0.85}) for name in arguments]
    if with_flex:
        promises = []
        mask = _block_mask(lambda b, h, i, j: i >= j, seqlen)
        mods = {
            "softcap": {"score_mod": lambda s, b, h, i, j: 30.0 * torch.tanh(s / 30.0)},
            "alibi_slopes": {"score_mod": lambda s, b, h, i, j: s - slopes[h] * (i - j)},
            "sinks": {"sinks": sinks},
        }
        for name, given in mods.items():
            reference = entries[name].reference
            entries[f"FlexAttention, {name}"] = _flex(leaves, visible, reference, block_mask=mask, **given)
            promises.append(Promise(name, (f"FlexAttention, {name}",), _both(1.3)))
    return Contest("scores", f"{batch}x{heads}x{seqlen}, causal", heads, head_dim, entries, tuple(promises))


def window(head_dim, with_flex):
    """A causal window of 1,024 keys in 16,384."""
    seqlen, left, heads = 16384, 1024, 2048 // head_dim
    leaves = _qkv(1, heads, seqlen, head_dim)
    full = seqlen * (seqlen + 1) // 2
    seen = full - (seqlen - left - 1) * (seqlen - left) // 2
    entries = {
        "v3, plain": _plain(leaves, full, True),
        "window": _ours(leaves, seen, causal=True, window=(left, 0)),
    }
    promise = Promise("window", ("v3, plain",), _both(0.85), per_flop=True)
    if with_flex:
        mask = _block_mask(lambda b, h, i, j: (i >= j) & (i - j <= left), seqlen)
        entries["FlexAttention"] = _flex(leaves, seen, entries["window"].reference, block_mask=mask)
        promise = Promise("window", ("FlexAttention",), _both(1.3))
    return Contest("window", f"1x{heads}x{seqlen}, causal, 1024 left", heads, head_dim, entries, (promise,))


def document_lengths(total=16384, shortest=64, longest=4096):
    """Lengths of 64 to 4,096 tokens, uniform by a fixed seed, that sum up to `total`."""
    generator, lengths = torch.Generator().manual_seed(0), []
    while total > 0:
        length = min(total, int(torch.randint(shortest, longest + 1, (), generator=generator)))
        lengths.append(length if total - length >= shortest or total == length else total)
        total -= lengths[-1]
    return lengths


def packed(head_dim, with_flex):
    """Sequences of mixed lengths beside a dense batch of as many tokens and as much work."""
    lengths, heads = document_lengths(), 2048 // head_dim
    total = sum(lengths)
    same_work = max(1, round(total**2 / sum(n * n for n in lengths)))  # equal sequences
    leaves = _qkv(1, heads, total, head_dim, layout="bshd")
    dense = _qkv(same_work, heads, total // same_work, head_dim)
    seen = sum(n * (n + 1) // 2 for n in lengths)
    n = total // same_work
    offsets = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    arguments = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets, "causal": True}
    arguments |= {"max_seqlen_q": max(lengths), "max_seqlen_k": max(lengths)}

    def run(q, k, v, algorithm="auto"):
        rows = [x.transpose(1, 2)[0] for x in (q, k, v)]
        return flash_attention(*rows, algorithm=algorithm, **arguments).unsqueeze(0).transpose(1, 2)

    reference = functools.partial(run, algorithm="v2")
    entries = {
        "v3, plain": _plain(dense, same_work * n * (n + 1) // 2, True),
        "packed": Entry(run, leaves, seen, reference),
    }
    promise = Promise("packed", ("v3, plain",), _both(0.85), per_flop=True)
    if with_flex:
        document = torch.repeat_interleave(torch.tensor(lengths, device="cuda"))
        mask = _block_mask(lambda b, h, i, j: (i >= j) & (document[i] == document[j]), total)
        entries["FlexAttention"] = _flex(leaves, seen, reference, block_mask=mask)
        promise = Promise("packed", ("FlexAttention",), _both(1.5))
    shape = f"{total} tokens x {heads}, {len(lengths)} sequences, causal; dense {same_work}x{heads}x{n}"
    return Contest("packed", shape, heads, head_dim, entries, (promise,))


def masks_and_dropout(head_dim, _):
    """A float and a bool mask, and dropout, beside SDPA's backends that take them."""
    batch, heads, seqlen = 4, 16, 4096
    leaves = _qkv(batch, heads, seqlen, head_dim)
    visible = batch * seqlen * seqlen
    bias = torch.randn(batch, 1, seqlen, seqlen, device="cuda", dtype=DTYPE)
    masks = {"float mask": bias, "bool mask": bias > -1}
    entries = {
        "v3, plain": _plain(leaves, visible, False),
        "dropout": _ours(leaves, visible, dropout_p=0.1),
        "SDPA flash, dropout": _sdpa("SDPA flash", leaves, visible, dropout_p=0.1),
    }
    promises = [Promise("dropout", ("SDPA flash, dropout",), _both(1.2))]
    for name, mask in masks.items():
        entries[name] = ours = _ours(leaves, visible, attn_mask=mask)
        over = [backend for backend in SDPA if backend not in ("SDPA flash", "SDPA math")]
        for backend in over:
            entries[f"{backend}, {name}"] = _sdpa(backend, leaves, visible, ours.reference, attn_mask=mask)
        promises.append(Promise(name, tuple(f"{backend}, {name}" for backend in over), _both(1.5)))
    return Contest("masks", f"{batch}x{heads}x{seqlen}", heads, head_dim, entries, tuple(promises))


def grouped_mask(head_dim, _):
    """A float mask with fewer key heads, for which SDPA has its quadratic backend alone."""
    heads, heads_kv, seqlen = 32, 8, 4096
    leaves = _qkv(1, heads, seqlen, head_dim, heads_kv)
    bias = torch.randn(1, 1, seqlen, seqlen, device="cuda", dtype=DTYPE)
    visible = seqlen * seqlen
    ours = _ours(leaves, visible, attn_mask=bias)
    math = _sdpa("SDPA math", leaves, visible, ours.reference, attn_mask=bias, enable_gqa=True)
    promise = Promise("float mask", ("SDPA math",), _both(10.0))
    return Contest(
        "grouped mask",
        f"1x{heads}/{heads_kv}x{seqlen}",
        heads,
        head_dim,
        {"float mask": ours, "SDPA math": math},
        (promise,),
    )


def bias_gradient(head_dim, _):
    """The gradient of a (1, heads, N, N) bias."""
    batch, heads, seqlen = 4, 16, 2048
    bias = torch.randn(1, heads, seqlen, seqlen, device="cuda", dtype=DTYPE)
    leaves = (*_qkv(batch, heads, seqlen, head_dim), bias)
    visible = batch * seqlen * seqlen

    def run(q, k, v, mask, **arguments):
        return flash_attention(q, k, v, attn_mask=mask, **arguments)

    reference = functools.partial(run, algorithm="v2")
    entries = {
        "bias": Entry(run, leaves, visible, reference),
        "bias, deterministic": Entry(functools.partial(run, deterministic=True), leaves, visible, reference),
        "SDPA efficient": _sdpa("SDPA efficient", leaves, visible, reference),
    }
    promises = (Promise("bias", ("SDPA efficient",), {"backward": 1.5}),)
    return Contest(
        "bias gradient", f"{batch}x{heads}x{seqlen}", heads, head_dim, entries, promises, passes=("backward",)
    )


def block_sparse(head_dim, _):
    """A quarter of the blocks of 128 x 128, at random for each head; each row of blocks has one on at least."""
    seqlen, block, heads = 16384, 128, 2048 // head_dim
    leaves = _qkv(1, heads, seqlen, head_dim)
    blocks = seqlen // block
    order = torch.rand(1, heads, blocks, blocks, device="cuda").argsort(-1)
    on = order < blocks // 4
    entries = {
        "v3, plain": _plain(leaves, seqlen * seqlen, False),
        "block_mask": _ours(leaves, seqlen * seqlen // 4, block_mask=on, block_size=block),
    }
    promises = (Promise("block_mask", ("v3, plain",), {"forward": 3.2, "backward": 2.8}),)
    return Contest("block-sparse", f"1x{heads}x{seqlen}, 25%", heads, head_dim, entries, promises)


CONTESTS = (window, packed, score_features, masks_and_dropout, grouped_mask, bias_gradient, block_sparse)
WITH_FLEX = (window, packed, score_features)
