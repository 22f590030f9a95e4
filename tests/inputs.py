"""Shapes, data families and memory layouts that the tests share. Random numbers come from torch's seed."""

import math
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Shape:
    batch: int = 1
    heads: int = 2
    heads_kv: int = 2
    seqlen_q: int = 40
    seqlen_k: int = 40
    head_dim: int = 32

    def __str__(self):
        return f"b{self.batch}-h{self.heads}/{self.heads_kv}-q{self.seqlen_q}-k{self.seqlen_k}-d{self.head_dim}"

    @property
    def q(self):
        return (self.batch, self.heads, self.seqlen_q, self.head_dim)

    @property
    def kv(self):
        return (self.batch, self.heads_kv, self.seqlen_k, self.head_dim)

    def with_(self, **changes):
        return replace(self, **changes)


# ---- data families: each fills (q, k, v) in fp32 -------------------------------------------------


def _randn(q, k, v):
    for x in (q, k, v):
        x.normal_()


def _randn3(q, k, v):
    for x in (q, k, v):
        x.normal_().mul_(3)


def _outliers(q, k, v):
    """N(0, 1) + N(0, 100) on one element in a thousand: the activations of large models."""
    for x in (q, k, v):
        x.normal_()
        x += 10 * torch.randn_like(x) * (torch.rand_like(x) < 1e-3)


def _sink(q, k, v):
    """The first key takes nearly all of every row."""
    _randn(q, k, v)
    q[..., 0] = 1
    k[..., :1, 0] = 20 * q.shape[-1] ** 0.5


def _small_ints(q, k, v):
    """Exact in every dtype: an indexing error cannot hide behind rounding."""
    for x in (q, k, v):
        x.copy_(torch.randint_like(x, -2, 3))


def _rising_logits(q, k, v):
    """Each key beats all before it: the running maximum moves at every step."""
    _randn(q, k, v)
    q[..., 0] = 2
    k[..., 0] = torch.linspace(-8, 8, k.shape[2], device=k.device) * q.shape[-1] ** 0.5 / 2


def _falling_logits(q, k, v):
    _rising_logits(q, k, v)
    k[..., 0].neg_()


def _rand01(q, k, v):
    for x in (q, k, v):
        x.uniform_()


def _shifted(q, k, v):
    for x in (q, k, v):
        x.normal_().add_(2)


def _key_channel(mean):
    def fill(q, k, v):
        """One "massive activation" channel of the keys, as seen in real checkpoints."""
        _randn(q, k, v)
        k[..., 0] += mean

    return fill


TIGHT_FAMILIES = {
    "randn": _randn,
    "randn3": _randn3,
    "outliers": _outliers,
    "sink": _sink,
    "small_ints": _small_ints,
    "rising_logits": _rising_logits,
    "falling_logits": _falling_logits,
}
BIASED_FAMILIES = {
    "rand01": _rand01,
    "shifted": _shifted,
    "key_channel_-30": _key_channel(-30.0),
    "key_channel_-120": _key_channel(-120.0),
    "key_channel_-960": _key_channel(-960.0),
}
FAMILIES = TIGHT_FAMILIES | BIASED_FAMILIES


def make_qkv(shape, dtype, device, family="randn"):
    q, k, v = (torch.empty(s, device=device) for s in (shape.q, shape.kv, shape.kv))
    FAMILIES[family](q, k, v)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def make_qkv_dout(shape, dtype, device, family="randn"):
    q, k, v = make_qkv(shape, dtype, device, family)
    return q, k, v, torch.randn(shape.q, device=device).to(dtype)


# ---- memory layouts: the same values at other addresses, `fill` everywhere around them -----------


def _inside(tensor, buffer_shape, view, fill):
    buffer = torch.full(buffer_shape, fill, dtype=tensor.dtype, device=tensor.device)
    placed = view(buffer)
    placed.copy_(tensor)
    return placed


def _bshd(x, fill):
    batch, heads, seqlen, head_dim = x.shape
    return _inside(x, (batch, seqlen, heads, head_dim), lambda b: b.transpose(1, 2), fill)


def _sbhd(x, fill):
    batch, heads, seqlen, head_dim = x.shape
    return _inside(x, (seqlen, batch, heads, head_dim), lambda b: b.permute(1, 2, 0, 3), fill)


def _packed_qkv(x, fill):
    """One third of a fused (batch, seqlen, 3, heads, head_dim) projection."""
    batch, heads, seqlen, head_dim = x.shape
    return _inside(x, (batch, seqlen, 3, heads, head_dim), lambda b: b[:, :, 1].transpose(1, 2), fill)


def _gapped_rows(gap):
    def place(x, fill):
        batch, heads, seqlen, head_dim = x.shape
        return _inside(x, (batch, heads, seqlen, head_dim + gap), lambda b: b[..., :head_dim], fill)

    return place


def _longer_cache(x, fill):
    """A prefix of a longer cache, in a larger batch of it."""
    batch, heads, seqlen, head_dim = x.shape
    shape = (batch + 1, heads + 1, seqlen + 70, head_dim)
    return _inside(x, shape, lambda b: b[:batch, 1:, :seqlen], fill)


def _offset(offset):
    def place(x, fill):
        return _inside(x, (x.numel() + offset,), lambda b: b[offset:].view(x.shape), fill)

    return place


LAYOUTS = {
    "contiguous": lambda x, _: x.clone(memory_format=torch.contiguous_format),
    "bshd": _bshd,
    "sbhd": _sbhd,
    "packed_qkv": _packed_qkv,
    "gap8": _gapped_rows(8),
    "gap3": _gapped_rows(3),
    "longer_cache": _longer_cache,
    "offset1": _offset(1),
    "offset8": _offset(8),
    "offset13": _offset(13),
}
# Rows of 16-bit numbers begin at multiples of 16 bytes, if head_dim is a multiple of 8.
ALIGNED_LAYOUTS = tuple(name for name in LAYOUTS if name not in ("gap3", "offset1", "offset13"))


def lay_out(tensor, layout, fill=0.0):
    """A copy of `tensor` with the named strides and storage offset; `fill` lies in all other memory."""
    placed = LAYOUTS[layout](tensor, fill)
    assert placed.stride(-1) == 1 or tensor.shape[-1] == 1
    return placed


def with_aligned_rows(mask):
    """A copy whose rows begin at multiples of 16 bytes, as v3 takes it, with what must not be read between."""
    seqlen_k = mask.shape[-1]
    fill = True if mask.dtype == torch.bool else math.nan
    shape = (*mask.shape[:-1], -(-seqlen_k // 16) * 16 + 16)
    return _inside(mask, shape, lambda b: b[..., :seqlen_k], fill)


def far_apart(tensor, dim):
    """A copy whose entries along `dim` lie more than 2^31 elements apart. On the CPU the memory between
    them is never touched and hence never taken."""
    strides = list(tensor.narrow(dim, 0, 1).contiguous().stride())
    strides[dim] = (1 << 31) + 64
    size = strides[dim] * (tensor.shape[dim] - 1) + tensor.numel() // tensor.shape[dim]
    buffer = torch.empty(size, dtype=tensor.dtype, device=tensor.device)
    return buffer.as_strided(tensor.shape, strides).copy_(tensor)


def with_absurd_strides(tensor):
    """The same view with a meaningless stride on every dimension of size 1 but the last."""
    sizes, strides = tensor.shape[:-1], tensor.stride()[:-1]
    absurd = [99990001 if size == 1 else stride for size, stride in zip(sizes, strides, strict=True)]
    return tensor.as_strided(tensor.shape, (*absurd, tensor.stride(-1)))
