"""Packed sequences and padded batches for the tests, with NaN wherever nothing is to be read."""

import itertools
import math

import pytest
import torch
from general_cases import call, on_device
from matrix import CAUSAL_MODES, HALF_DTYPES

BF16 = torch.bfloat16
NAN = math.nan
EDGES = (0, 0, 1, 63, 64, 65, 127, 128, 129, 191, 192, 193, 257, 385)
FEATURES = ("window", "softcap", "alibi", "sinks")
COMBINATIONS = ((), *((name,) for name in FEATURES), FEATURES)
MALFORMED = (
    (0, 10, 5, 20, 30), (-7, 100, 200, 300, 400), (0, 10, 20, 30, 10**9), (2**31 - 1, -(2**31), 0, 5, 3),
    (500, 400, 300, 200, 10), (0, 0, 0, 0, 2**31 - 1), (0, 600, 0, 600, 0),
)  # fmt: skip


def i32(values):
    return torch.tensor(values, dtype=torch.int32)


def draw_lengths(rng, batch):
    return [rng.choice([*EDGES, rng.randint(0, 700)]) for _ in range(batch)]


def draw_features(names, rng, batch, heads):
    features = {
        "window": ("window", (rng.choice([-1, 0, 30, 64, 200]), rng.choice([-1, 0, 64, 128]))),
        "softcap": ("softcap", rng.choice([2.0, 30.0])),
        "alibi": ("alibi_slopes", torch.rand(rng.choice([(heads,), (batch, heads)])) * 0.3),
        "sinks": ("sinks", torch.randn(heads) * 2),
    }
    return dict(features[name] for name in names)


def of_entry(features, b):
    """The arguments of a call with batch entry `b` alone."""
    own = dict(features)
    if "alibi_slopes" in features and features["alibi_slopes"].dim() == 2:
        own["alibi_slopes"] = features["alibi_slopes"][b : b + 1]
    return own


class Packed:
    """Sequences of these lengths behind each other, `gap` rows of NaN before the first and behind the last."""

    def __init__(self, lengths_q, lengths_k, heads, heads_kv, head_dim, dtype=BF16, gap=7, device="cuda"):
        self.cu_q, self.cu_k = (
            list(itertools.accumulate(lengths, initial=gap)) for lengths in (lengths_q, lengths_k)
        )
        tensors = []
        for cu, n in ((self.cu_q, heads), (self.cu_k, heads_kv), (self.cu_k, heads_kv)):
            x = torch.full((cu[-1] + gap, n, head_dim), NAN)
            x[cu[0] : cu[-1]] = torch.randn(cu[-1] - cu[0], n, head_dim)
            tensors.append(x.to(device, dtype))
        self.qkv = tensors
        self.lengths = {
            "cu_seqlens_q": i32(self.cu_q).to(device),
            "cu_seqlens_k": i32(self.cu_k).to(device),
            "max_seqlen_q": max(1, *lengths_q),
            "max_seqlen_k": max(1, *lengths_k),
        }

    def rows(self, b):
        return slice(*self.cu_q[b : b + 2]), slice(*self.cu_k[b : b + 2])

    def alone(self, b):
        q_rows, k_rows = self.rows(b)
        return [x[r].transpose(0, 1)[None] for x, r in zip(self.qkv, (q_rows, k_rows, k_rows), strict=True)]

    def call(self, features, **options):
        return call(*self.qkv, features | self.lengths, **options)


def draw_packed(rng, names, head_dim, batches, device):
    """(packed, features, options) of a call; without a query or a key there is none, and the test is skipped."""
    torch.manual_seed(rng.randrange(1 << 30))
    batch, heads_kv, group = rng.choice(batches), rng.choice([1, 2]), rng.choice([1, 2, 3])
    lengths = (draw_lengths(rng, batch), draw_lengths(rng, batch))
    dim = head_dim - rng.choice([0, 0, 24])
    packed = Packed(*lengths, heads_kv * group, heads_kv, dim, rng.choice(HALF_DTYPES), rng.choice([0, 7]), device)
    if 0 in (len(x) for x in packed.qkv):
        pytest.skip("drew nothing")
    features = on_device(draw_features(names, rng, batch, heads_kv * group), device)
    return packed, features, {"causal": rng.choice(CAUSAL_MODES), "scale": rng.choice([None, None, -0.1])}
