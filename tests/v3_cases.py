"""Random calls of general attention for v3's tests, and masks in rows that its kernels read."""

import itertools
import math
import random

import torch
from general_cases import check_backward, on, on_device
from inputs import ALIGNED_LAYOUTS, Shape, lay_out, make_qkv_dout, with_aligned_rows
from matrix import CAUSAL_MODES, HALF_DTYPES

FEATURES = ("window", "alibi", "softcap", "sinks")
COMBINATIONS = [names for n in range(1, 5) for names in itertools.combinations(FEATURES, n)]
WINDOWS = (-1, 0, 1, 30, 63, 64, 127, 128, 200, 400)
MASK_SHAPES = ("bhqk", "1hqk", "b1qk", "11qk", "b11k", "1h1k", "111k")


def draw_features(names, rng, shape):
    """Arguments of the features, on the CPU."""
    torch.manual_seed(rng.randrange(1 << 30))
    slopes = rng.choice([(shape.heads,), (shape.batch, shape.heads)])
    features = {
        "window": ("window", (rng.choice(WINDOWS), rng.choice(WINDOWS))),
        "alibi": ("alibi_slopes", torch.rand(slopes) * rng.choice([0.01, 0.5, -0.01])),
        "softcap": ("softcap", rng.choice([0.5, 2.0, 15.0, 50.0])),
        "sinks": ("sinks", torch.randn(shape.heads) * 2 + rng.choice([-3, 0, 8])),
    }
    return dict(features[name] for name in names)


def draw_shape(rng):
    heads_kv, group = rng.choice([1, 1, 2]), rng.choice([1, 2, 3])
    length = lambda: rng.choice([1, 63, 64, 65, 129, 192, 193, 257, rng.randint(1, 900)])  # noqa: E731
    head_dim = rng.choice([8, 40, 64, 64, 72, 128, 128])
    return Shape(rng.choice([1, 2, 3]), heads_kv * group, heads_kv, length(), length(), head_dim)


def draw_case(seed, names, device):
    """Everything of a forward call from one seed, NaN between the rows: tensors, features, options."""
    rng = random.Random(seed)
    shape = draw_shape(rng)
    features = on_device(draw_features(names, rng, shape), device)
    tensors = make_qkv_dout(shape, rng.choice(HALF_DTYPES), "cpu", rng.choice(["randn", "shifted", "randn3"]))
    layout = rng.choice(ALIGNED_LAYOUTS)
    tensors = [lay_out(x, layout, math.nan) for x in on(device, *tensors)]
    return tensors, features, {"causal": rng.choice(CAUSAL_MODES), "scale": rng.choice([None, None, 0.3, -0.1])}


def draw_gradient_case(rng, names, device, lengths_k=range(1, 301)):
    """(shape, (q, k, v, dout, dlse), features); the caller may add features before it draws the causal mask."""
    shape = Shape(2, 4, 2, rng.randint(1, 300), rng.choice(lengths_k), rng.choice([64, 128]))
    tensors = make_qkv_dout(shape, torch.bfloat16, device)
    dlse = torch.randn(shape.q[:3], device=device)
    return shape, (*tensors, dlse), on_device(draw_features(names, rng, shape), device)


def check_drawn_backward(device, algorithm, seed, draw):
    """Everything of a backward call from one seed; `draw(rng, shape, dtype)` gives its features, on the CPU."""
    rng = random.Random(seed)
    group, heads_kv = rng.choice([1, 1, 2, 3]), rng.choice([1, 2])
    length = lambda: rng.choice([1, 17, 64, 65, 127, 128, 129, rng.randint(1, 700)])  # noqa: E731
    head_dim = rng.choice([8, 64, 64, 72, 128, 128])
    shape = Shape(rng.choice([1, 2]), heads_kv * group, heads_kv, length(), length(), head_dim)
    dtype = rng.choice(HALF_DTYPES)
    features = on_device(draw(rng, shape, dtype), device)
    tensors = on(device, *make_qkv_dout(shape, dtype, "cpu", rng.choice(["randn", "shifted", "randn3"])))
    dlse = torch.randn(shape.q[:3]).to(device) if rng.random() < 0.5 else None
    options = {
        "causal": rng.choice(CAUSAL_MODES),
        "scale": rng.choice([None, 0.3, -0.1]),
        "deterministic": rng.random() < 0.5,
    }
    check_backward(*tensors, dlse, features, algorithm=algorithm, **options)


def make_mask(kind, letters, shape, dtype, device, hidden=0.3):
    sizes = {"b": shape.batch, "h": shape.heads, "q": shape.seqlen_q, "k": shape.seqlen_k, "1": 1}
    sizes = [sizes[letter] for letter in letters]
    visible = torch.rand(sizes, device=device) >= hidden
    if kind == "bool":
        return with_aligned_rows(visible)
    return with_aligned_rows((2 * torch.randn(sizes, device=device)).masked_fill(~visible, -math.inf).to(dtype))
