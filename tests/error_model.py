"""What a right kernel's error looks like: the expected RMS error of every element, from first principles.

A flash kernel rounds four things to the inputs' dtype: P and dS as they enter a matrix product, O before
delta = rowsum(dO * O) is taken from it, and the result. Everything else happens in fp32 (fp64 for fp64
inputs). Taking these roundings as independent and of first order gives a standard deviation for each
element of out, dq, dk and dv, exact where rows are nearly one-hot, where results cancel, and where keys
have a large mean. numerics.py gates errors in units of it.

Everything is dense (seqlen_q x seqlen_k) in fp64: for the small shapes of the tests.
"""

import math
from dataclasses import dataclass

import torch


def ulp(x, dtype):
    """Distance between neighbours of `dtype` around x (fp64)."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(x.abs().clamp(min=info.tiny)).exponent - 1
    return torch.ldexp(torch.full_like(x, info.eps), exponent)


def rounding_variance(x, dtype):
    """An error uniform within half an ulp."""
    return ulp(x, dtype).square() / 12


def _heads_of(kv, heads):
    return kv.double().repeat_interleave(heads // max(1, kv.shape[1]), dim=1)


def _sum_groups(per_q_head, heads_kv):
    batch, heads = per_q_head.shape[:2]
    return per_q_head.reshape(batch, heads_kv, heads // max(1, heads_kv), *per_q_head.shape[2:]).sum(2)


@dataclass
class ErrorModel:
    """The exact intermediate results of one attention call and the sizes of their errors."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor  # reference, fp64
    lse: torch.Tensor  # reference, fp64
    visible: torch.Tensor
    scale: float
    # Beyond plain attention: what is added to the scores, their soft cap, what dropout multiplies P by.
    bias: torch.Tensor | float = 0.0
    softcap: float = 0.0
    dropout: torch.Tensor | float = 1.0
    # Whether dQ is corrected by the sums of the computed rows of dS. v3 has none: under a soft cap it does
    # without the mean of the keys, and with a sink it does not learn the error of delta.
    has_row_sums: bool = True
    is_cuda: bool | None = None  # whose results are judged; None: those of the tensors' device

    def __post_init__(self):
        self.is_cuda = self.q.is_cuda if self.is_cuda is None else self.is_cuda
        self.dtype = self.q.dtype
        computed_in = torch.finfo(torch.float64 if self.dtype == torch.float64 else torch.float32)
        self.eps = computed_in.eps
        self.underflow = max(computed_in.tiny, 1e-150) ** 2  # smaller numbers may become 0
        self.heads_kv = self.k.shape[1]
        heads, head_dim = self.q.shape[1], self.q.shape[3]
        q, k, v = self.q.double(), _heads_of(self.k, heads), _heads_of(self.v, heads)
        self.q, self.k, self.v = q, k, v

        products = self.scale * (q @ k.mT)
        scores, self.cap = products, 1.0  # the soft cap's derivative
        if self.softcap:
            scores = self.softcap * torch.tanh(products / self.softcap)
            self.cap = 1 - (scores / self.softcap).square()
        scores = scores + self.bias
        lse = self.lse.masked_fill(self.lse == -math.inf, 0.0).unsqueeze(-1)
        self.p = torch.exp((scores - lse).masked_fill(~self.visible, -math.inf))
        # Relative error of P before it is rounded: the dot product, the rounding of exp's argument, exp.
        dot = self._accumulation(self.scale**2 * (q.square() @ k.square().mT), products, head_dim)
        terms = products.abs() * self.cap + scores.abs() + abs(self.bias) + lse.abs()
        if not self.softcap and isinstance(self.bias, float):
            terms = scores.abs() + lse.abs()
        # tanh is right to an ulp of its own result.
        dot = dot * self.cap**2 + (self.eps * self.softcap) ** 2
        self.p_relative_variance = dot + self.eps**2 * (terms.square() + 4)
        self.p_dropped = self.p * self.dropout
        # P may become 0 before dropout multiplies it.
        underflow = self.underflow * max(1.0, float(torch.as_tensor(self.dropout).max())) ** 2
        self.p_rounding = self._rounding(self.p_dropped) + underflow

    def _rounding(self, x):
        """Variance from rounding an operand of a matrix product; fp32 and fp64 are not rounded again."""
        if self.dtype in (torch.float32, torch.float64):
            return self.eps**2 * x.square()
        return torch.where(x == 0, 0.0, rounding_variance(x, self.dtype))

    def _lost(self, x):
        """What rounds to 0 as an operand. Always downwards: unlike other roundings these do not average out."""
        if self.dtype in (torch.float32, torch.float64):
            return torch.zeros_like(x)
        return torch.where(x.abs() <= torch.finfo(self.dtype).smallest_normal * torch.finfo(self.dtype).eps / 2, x, 0.0)

    def _accumulation(self, terms_squared, total, count):
        """Variance of a sum of `count` terms: partial sums walk at random, and towards the total."""
        return self.eps**2 * ((1 + count / 12) * terms_squared + count / 36 * total**2)

    def lse_sigma(self):
        """From the errors of the scores; rounding lse itself is not in it."""
        return (self.p.square() * self.p_relative_variance).sum(-1).sqrt()

    def out_sigma(self):
        p2, v2 = self.p_dropped.square(), self.v.square()
        variance = rounding_variance(self.out, self.dtype) + self.p_rounding @ v2
        variance += self._accumulation(p2 @ v2, self.out, self.k.shape[2])
        # Errors of the scores change numerator and row sum alike: only V - out counts.
        weight = self.p_relative_variance * self.p.square()
        out, kept = self.out, self.dropout
        spread = (weight * kept**2) @ v2 - 2 * out * ((weight * kept) @ self.v)
        spread += out.square() * weight.sum(-1, keepdim=True)
        return (variance + spread.clamp(min=0)).sqrt()

    def gradient_sigmas(self, dout, dlse, dq, dk, dv):
        """For the reference gradients dq, dk, dv."""
        dout = dout.double()
        do2, q2, k2, p2 = dout.square(), self.q.square(), self.k.square(), self.p.square()
        seqlen_q, seqlen_k, head_dim = self.q.shape[2], self.k.shape[2], self.q.shape[3]
        dlse = 0.0 if dlse is None else dlse.double().unsqueeze(-1)

        do_o = (dout * self.out).sum(-1, keepdim=True)
        do_v = (dout @ self.v.mT) * self.dropout
        dp = do_v - (do_o - dlse)
        ds = self.p * dp
        ds2 = ds.square()
        # delta is taken from the computed out, with all errors that it has.
        delta_variance = (do2 * rounding_variance(self.out, self.dtype)).sum(-1, keepdim=True)
        delta_variance += (self.p_rounding * (dout @ self.v.mT).square()).sum(-1, keepdim=True)
        delta_variance += (self.p_relative_variance * ds2).sum(-1, keepdim=True)
        delta_variance += self._accumulation(
            (do2 * self.out.square()).sum(-1, keepdim=True), do_o.abs() + abs(dlse), head_dim
        )
        ds_variance = self._rounding(ds) + self.p_relative_variance * ds2
        ds_variance += self.underflow * (1 + dp.square())
        ds_variance += p2 * self._accumulation((do2 @ self.v.square().mT) * self.dropout**2, do_v, head_dim)
        self.ds, self.ds_variance = ds, ds_variance + p2 * delta_variance  # of what is added to the scores
        # 1 - tanh^2 cancels where the cap is reached.
        cap_variance = (4 * self.eps) ** 2 * ds2 if self.softcap else 0.0 * ds2
        # It is rounded behind that: where it is subnormal by more than the cap leaves of its rounding.
        ds_variance = (ds_variance - self._rounding(ds)) * self.cap**2 + self._rounding(ds * self.cap) + cap_variance
        ds, ds2 = ds * self.cap, ds2 * self.cap**2
        p2, weights = p2 * self.cap**2, self.p * self.cap
        if self.is_cuda and head_dim > 128:
            # v3's warpgroups hand P on as an operand, rounded, and dS is computed from that.
            ds_variance += self.p_rounding * dp.square()

        # rowsum(dS) is known, so the mean of the keys can be taken out of dQ's error. The reference does no
        # such thing, and in fp64 its error counts as much as the kernel's.
        key_sum = self.k.sum(2, keepdim=True)
        # The CUDA kernels take the mean of at most 512 keys, evenly spaced: an outlier among them shows.
        step = -(-seqlen_k // 512) if self.is_cuda else 1
        sampled = self.k[:, :, :: max(1, step)]
        mean = sampled.mean(2, keepdim=True).nan_to_num()
        if self.is_cuda:
            # They round it, and leave columns as they are whose mean is small beside their values.
            is_small = mean.square() <= sampled.square().mean(2, keepdim=True) / 16
            mean = mean.masked_fill(is_small, 0.0).to(self.dtype)
        if self.softcap and not self.has_row_sums:
            mean = mean * 0.0
        centred = self.k - mean
        rowsum_variance = ds_variance.sum(-1, keepdim=True) + delta_variance
        # A sink's share of the row, which the known sum is made with.
        share = (1 - self.p.sum(-1, keepdim=True)) * (self.lse.unsqueeze(-1) != -math.inf)
        relative = self.eps * (self.lse.unsqueeze(-1).abs().nan_to_num(posinf=0.0) + 4)
        rowsum_variance += (share * relative * (do_o.abs() + abs(dlse))).square()
        dq_variance = self._accumulation((ds2 + ds_variance + p2 * delta_variance) @ k2, ds @ self.k, seqlen_k)
        dq_variance += cap_variance @ k2
        # A sink and a soft cap leave the rows a weight below 1, and by so much less is corrected.
        weight = weights.sum(-1, keepdim=True)
        dq_variance += ((1 - weight) * mean).square() * ds_variance.sum(-1, keepdim=True)
        if not self.has_row_sums:
            dq_variance += (share * mean).square() * delta_variance + (self._lost(ds) @ centred).square()
        dq_variance += rowsum_variance * self._accumulation(k2.sum(2, keepdim=True), key_sum, seqlen_k)
        for keys in (centred, self.k) if self.dtype == torch.float64 else (centred,):
            dq_variance += ds_variance @ keys.square() + delta_variance * (weights @ keys).square()
        dk_variance = (ds_variance + p2 * delta_variance).mT @ q2
        dk_variance += (self._lost(ds).mT @ self.q).square()
        dk_variance += self._accumulation(ds2.mT @ q2, ds.mT @ self.q, seqlen_q)
        p, p2 = self.p_dropped, self.p_dropped.square()
        dv_variance = (self.p_rounding + self.p_relative_variance * p2).mT @ do2
        dv_variance += (self._lost(p).mT @ dout).square()
        dv_variance += self._accumulation(p2.mT @ do2, p.mT @ dout, seqlen_q)

        scale2 = self.scale**2
        variances = (
            scale2 * dq_variance + rounding_variance(dq, self.dtype),
            scale2 * _sum_groups(dk_variance, self.heads_kv) + rounding_variance(dk, self.dtype),
            _sum_groups(dv_variance, self.heads_kv) + rounding_variance(dv, self.dtype),
        )
        return tuple(x.sqrt() for x in variances)
