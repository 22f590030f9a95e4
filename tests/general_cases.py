"""Arguments beyond plain attention for the tests: random ones, and what they mean score by score."""

import math
import random

import torch
from calls import assert_same_bits
from error_model import ErrorModel, ulp
from inputs import Shape, make_qkv_dout, with_aligned_rows
from matrix import HALF_DTYPES
from numerics import assert_lse, assert_within, causal_argument, default_scale, relative_error, where_judged

from flash_ext import attention_reference, explain
from flash_ext.philox import dropout_factor

FEATURES = ("bool_mask", "float_mask", "window", "alibi", "softcap", "sinks", "dropout", "block_mask")
MASK_SHAPES = ("bhqk", "1hqk", "b1qk", "11qk", "b11k", "1h1k", "11q1", "bhq1", "1111")
GRADIENTS = ("dq", "dk", "dv", "attn_mask", "alibi_slopes", "sinks")


def draw_mask_shape(rng, shape):
    sizes = {"b": shape.batch, "h": shape.heads, "q": shape.seqlen_q, "k": shape.seqlen_k, "1": 1}
    return [sizes[letter] for letter in rng.choice(MASK_SHAPES)]


def draw_feature(name, rng, shape, dtype):
    """The arguments of one feature."""
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    if name == "bool_mask":
        return {"attn_mask": torch.rand(draw_mask_shape(rng, shape)) < rng.choice([0.1, 0.5, 0.9])}
    if name == "float_mask":
        mask = torch.randn(draw_mask_shape(rng, shape)).to(rng.choice([dtype, accumulated]))
        return {"attn_mask": mask.masked_fill(torch.rand(mask.shape) < rng.choice([0, 0.3]), -math.inf)}
    if name == "window":
        return {"window": (rng.choice([-1, 0, 1, 7, 30]), rng.choice([-1, 0, 2, 20]))}
    if name == "alibi":
        sizes = rng.choice([(shape.heads,), (shape.batch, shape.heads)])
        return {"alibi_slopes": torch.rand(sizes, dtype=accumulated) * rng.choice([0.05, 0.5])}
    if name == "softcap":
        return {"softcap": rng.choice([0.5, 2.0, 30.0])}
    if name == "sinks":
        return {"sinks": (2 * torch.randn(shape.heads, dtype=accumulated)).to(rng.choice([dtype, accumulated]))}
    if name == "dropout":
        return {"dropout_p": rng.choice([0.1, 0.5, 0.9]), "rng_state": torch.randint(0, 1 << 62, (2,))}
    size = rng.choice([64, 128, 256])
    blocks = (-(-shape.seqlen_q // size), -(-shape.seqlen_k // size))
    sizes = (rng.choice([1, shape.batch]), rng.choice([1, shape.heads]), *blocks)
    return {"block_mask": torch.rand(sizes) < 0.6, "block_size": size}


def draw_features(rng, shape, dtype, names=None):
    if names is None:
        names = rng.sample(FEATURES, rng.randint(1, 4))
    torch.manual_seed(rng.randrange(1 << 30))
    features = {}
    for name in names:
        features |= draw_feature(name, rng, shape, dtype)
    return features


def call(q, k, v, features, *, algorithm="v2", causal="none", scale=None, tile=(16, 16)):
    features = dict(features)
    tile = tile if q.device.type == "cpu" else None
    return torch.ops.flash_ext.general_forward(
        q, k, v, algorithm=algorithm, causal=causal, scale=scale, tile=tile, **features
    )


def dense_meaning(q, k, features, causal):
    """(visible, bias, dropout) as the error model takes them."""
    batch, heads, seqlen_q, _ = q.shape
    seqlen_k, device = k.shape[2], q.device
    diagonal = 0 if causal == "top_left" else seqlen_k - seqlen_q
    distance = torch.arange(seqlen_q, device=device)[:, None] + diagonal - torch.arange(seqlen_k, device=device)
    left, right = features.get("window", (-1, -1))
    visible = torch.ones(batch, heads, seqlen_q, seqlen_k, dtype=torch.bool, device=device)
    if left >= 0:
        visible &= distance <= left
    if right >= 0 or causal != "none":
        visible &= distance >= -(0 if causal != "none" else right)
    bias = torch.zeros(batch, heads, seqlen_q, seqlen_k, dtype=torch.float64, device=device)
    mask = features.get("attn_mask")
    if mask is not None and mask.dtype == torch.bool:
        visible &= mask
    elif mask is not None:
        visible &= mask != -math.inf
        bias += mask.double().masked_fill(mask == -math.inf, 0)
    if "alibi_slopes" in features:
        bias -= features["alibi_slopes"].double()[..., None, None] * distance.abs()
    if "block_mask" in features:
        size = features["block_size"]
        blocks = features["block_mask"].repeat_interleave(size, 2).repeat_interleave(size, 3)
        visible &= blocks[..., :seqlen_q, :seqlen_k]
    dropout = 1.0
    if "dropout_p" in features:
        p, state = features["dropout_p"], features["rng_state"]
        dropout = dropout_factor(p, state, batch, heads, range(seqlen_q), seqlen_k)
    return visible, bias, dropout


def reduce_to(x, shape):
    """Sums over the dimensions that `shape` has 1 in."""
    for dim in range(4):
        x = x.sum(dim, keepdim=True) if shape[dim] == 1 else x
    return x


def error_model(q, k, v, exact, exact_lse, features, causal, scale, algorithm, is_cuda=None):
    """And the bias that it is made with."""
    visible, bias, dropout = dense_meaning(q, k, features, causal)
    softcap = features.get("softcap", 0.0)
    model = ErrorModel(
        q, k, v, exact, exact_lse, visible, default_scale(q, scale), bias, softcap, dropout,
        has_row_sums=algorithm not in ("auto", "v3"), is_cuda=is_cuda,
    )  # fmt: skip
    return model, bias


def check_forward(q, k, v, features, *, algorithm="v2", causal="none", scale=None):
    """Output and log-sum-exp alone, by the gates of numerics.py. What they are written to is NaN before."""
    for x in (q, q[..., 0].float()):
        torch.full_like(x, math.nan)  # freed at once, and handed out again
    out, lse = call(q, k, v, features, algorithm=algorithm, causal=causal, scale=scale)
    doubles = (x.double() for x in (q, k, v))
    exact, exact_lse = attention_reference(*doubles, causal=causal_argument(causal), scale=scale, **features)
    model, _ = error_model(q, k, v, exact, exact_lse, features, causal, scale, algorithm)
    assert_lse(lse, exact_lse, model.lse_sigma())
    assert_within(out, exact, model.out_sigma(), "out")
    return out, lse


def backward_algorithm(q, k, v, features, algorithm, causal, scale):
    """Whose kernels compute the gradients of everything that is given."""
    if algorithm != "auto":
        return algorithm
    mask = features.get("attn_mask")
    has_sums_over_rows = mask is not None and mask.is_floating_point() and mask.shape[2] < q.shape[2]
    if "alibi_slopes" in features or has_sums_over_rows:
        return "v2"
    return explain(q, k, v, causal=causal_argument(causal), scale=scale, **features).backward


def check_call(q, k, v, dout, dlse, features, *, algorithm="v2", causal="none", scale=None, tile=(16, 16)):
    """Forward and every gradient, by the gates of numerics.py."""
    names = [name for name in ("attn_mask", "alibi_slopes", "sinks") if name in features]
    names = [name for name in names if features[name].is_floating_point()]
    leaves = [x.detach().requires_grad_() for x in (q, k, v, *(features[name] for name in names))]
    given = features | dict(zip(names, leaves[3:], strict=True))
    out, lse = call(*leaves[:3], given, algorithm=algorithm, causal=causal, scale=scale, tile=tile)
    dlse = dlse.masked_fill(lse.isinf(), 0)
    gradients = torch.autograd.grad((out, lse), leaves, (dout, dlse))
    algorithm = backward_algorithm(q, k, v, features, algorithm, causal, scale)

    is_cuda = q.is_cuda
    everything = (q, k, v, dout, dlse, out.detach(), lse.detach(), *features.values(), *gradients)
    q, k, v, dout, dlse, out, lse, *rest = where_judged(*everything)
    features, gradients = dict(zip(features, rest, strict=False)), rest[len(features) :]
    doubles = [x.detach().double().requires_grad_() for x in (q, k, v, *(features[name] for name in names))]
    given = features | dict(zip(names, doubles[3:], strict=True))
    exact, exact_lse = attention_reference(*doubles[:3], causal=causal_argument(causal), scale=scale, **given)
    expected = torch.autograd.grad((exact, exact_lse), doubles, (dout.double(), dlse.double()))
    exact, exact_lse = exact.detach(), exact_lse.detach()

    model, bias = error_model(q, k, v, exact, exact_lse, features, causal, scale, algorithm, is_cuda)
    assert_lse(lse, exact_lse, model.lse_sigma())
    assert_within(out, exact, model.out_sigma(), "out")
    sigmas = model.gradient_sigmas(dout, dlse, *expected[:3])
    for name, actual, right, sigma in zip("qkv", gradients, expected, sigmas, strict=False):
        assert_within(actual, right, sigma, f"d{name}")
    for name, actual, right in zip(names, gradients[3:], expected[3:], strict=True):
        assert actual.shape == right.shape
        check_bias_gradient(name, actual, right, model, dout, dlse, features, bias)


def exact_backward(q, k, v, dout, dlse, features, *, causal="none", scale=None):
    """Out, lse and the gradients of q, k, v (and sinks) by the reference."""
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    doubles = dict(features)
    if "sinks" in features:
        doubles["sinks"] = features["sinks"].detach().double().requires_grad_()
        leaves.append(doubles["sinks"])
    exact, exact_lse = attention_reference(*leaves[:3], causal=causal_argument(causal), scale=scale, **doubles)
    loss = (exact * dout.double()).sum()
    if dlse is not None:
        loss = loss + (exact_lse.masked_fill(exact_lse.isinf(), 0) * dlse.double()).sum()
    return exact.detach(), exact_lse.detach(), torch.autograd.grad(loss, leaves)


def check_gradients(q, k, v, dout, dlse, features, right, gradients, *, algorithm, causal="none", scale=None):
    """Those of q, k and v, and if there is a fourth of sinks, against what exact_backward() has returned."""
    exact, exact_lse, expected = right
    model, bias = error_model(q, k, v, exact, exact_lse, features, causal, scale, algorithm)
    sigmas = model.gradient_sigmas(dout, dlse, *expected[:3])
    for name, actual, wanted, sigma in zip("qkv", gradients, expected, sigmas, strict=False):
        assert_within(actual, wanted, sigma, f"d{name}")
    if len(gradients) == 4:
        dlse = torch.zeros_like(exact_lse) if dlse is None else dlse
        check_bias_gradient("sinks", gradients[3], expected[3], model, dout, dlse, features, bias)


def check_backward(q, k, v, dout, dlse, features, *, algorithm, causal="none", scale=None, deterministic=False):
    """The gradients of one backward operator, from the reference's out and lse. Returns (dq, dk, dv, dsinks)."""
    has_sinks = "sinks" in features
    right = exact_backward(q, k, v, dout, dlse, features, causal=causal, scale=scale)
    exact, exact_lse, _ = right
    for count in (1 << 12, 1 << 17, 1 << 20, 1 << 22):  # what results and workspaces are then taken from
        torch.full((count,), math.nan, device=q.device)
    *gradients, _, _, dsinks = torch.ops.flash_ext.general_backward(
        dout, q, k, v, exact.to(q.dtype), exact_lse.float(), dlse, algorithm=algorithm, causal=causal, scale=scale,
        deterministic=deterministic, needs=[True, True, True, False, False, has_sinks], **features,
    )  # fmt: skip

    check_gradients(
        q, k, v, dout, dlse, features, right, (*gradients, dsinks) if has_sinks else gradients,
        algorithm=algorithm, causal=causal, scale=scale,
    )  # fmt: skip
    return *gradients, dsinks


def assert_near(gradients, others):
    """Gradients of two algorithms, which differ by roundings alone."""
    for i, (ours, other) in enumerate(zip(gradients, others, strict=True)):
        error = relative_error(ours, other.double())
        assert error <= 1e-2, f"gradient {i}: relative error {error:.3g}"


def check_repeatable_backward(q, k, v, dout, features, *, algorithm, causal="none"):
    """Deterministic gradients have the same bits each time, and are near v2's."""
    options = {"causal": causal} | features
    out, lse = torch.ops.flash_ext.general_forward(q, k, v, algorithm="v2", **options)
    options |= {"deterministic": True, "needs": [True, True, True, False, False, "sinks" in features]}

    def gradients(name):
        results = torch.ops.flash_ext.general_backward(dout, q, k, v, out, lse, algorithm=name, **options)
        return [x for x in results if x.numel()]

    first = gradients(algorithm)
    for _ in range(3):
        assert_same_bits(gradients(algorithm), first, "gradients", (*GRADIENTS[:3], "sinks"))
    assert_near(first, gradients("v2"))


def check_bias_gradient(name, actual, right, model, dout, dlse, features, bias):
    """Sums of dS: their errors add up at random, and rounding to the mask's dtype comes on top."""
    variance = model.ds_variance + (model.eps * model.ds.abs()).square() * 4
    distance = 1.0
    if name == "alibi_slopes":
        distance = (bias.shape[2] + bias.shape[3]) * 1.0
    if name == "sinks":
        sink = torch.exp(features["sinks"].double()[:, None] - model.lse)
        delta = (dout.double() * model.out).sum(-1) - dlse.double()
        terms = (dout.double().square() * (model.out_sigma().square())).sum(-1) + (model.eps * 32 * delta).square()
        sigma = (sink.square() * terms).sum((0, 2)).sqrt()
    elif name == "alibi_slopes":
        total = variance.sum((2, 3)).sqrt() * distance
        sigma = total if right.dim() == 2 else total.square().sum(0).sqrt()
    else:
        # Roundings of delta are shared by a row: its elements do not err independently.
        row = (variance.sqrt()).sum(-1, keepdim=True).square() / max(1, bias.shape[3])
        sigma = reduce_to(torch.maximum(variance, row) * (4 if right.shape[3] == 1 else 1), right.shape).sqrt()
    largest = right.abs().max()
    allowed = 10 * sigma + ulp(right, actual.dtype) + 64 * model.eps * largest + model.underflow**0.5 * 1e4
    excess = ((actual.double() - right).abs() - allowed).max().item()
    assert excess <= 0, f"d{name}: error {excess:.3g} beyond the allowed"


def random_case(seed, names=None, device="cpu"):
    """Everything drawn from one number: tensors, features, masks, tile."""
    rng = random.Random(seed)
    is_cpu = device == "cpu"
    algorithm = rng.choice(["v1", "v2"] if is_cpu else ["v1", "v2", "auto", "auto", "auto", "auto"])
    heads_kv, group = rng.choice([1, 1, 2]), rng.choice([1, 2, 3])
    lengths, longest = ([1, 5, 16, 17, 33, 70], 140) if is_cpu else ([1, 5, 17, 64, 70, 129], 400)
    length = lambda: rng.choice([*lengths, rng.randint(1, longest)])  # noqa: E731
    head_dims, dtypes = [1, 8, 24, 64], [torch.float64, torch.float32, *HALF_DTYPES]
    if algorithm == "auto":  # which is v3 where that can
        head_dims, dtypes = [8, 24, 64, 72, 128], HALF_DTYPES
    elif not is_cpu:
        head_dims, dtypes = [*head_dims, 100, 128, 192, 256], dtypes[1:]
    shape = Shape(rng.choice([1, 2, 3]), heads_kv * group, heads_kv, length(), length(), rng.choice(head_dims))
    dtype = rng.choice(dtypes)
    features = draw_features(rng, shape, dtype, names)
    q, k, v, dout = make_qkv_dout(shape, dtype, "cpu", rng.choice(["randn", "shifted", "randn3"]))
    dlse = torch.randn(shape.q[:3], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    options = {
        "algorithm": algorithm,
        "causal": rng.choice(["none", "bottom_right", "top_left"]),
        "scale": rng.choice([None, 0.3]),
        "tile": rng.choice([(16, 16), (7, 9), (64, 32)]),
    }
    features = on_device(features, device)
    if "attn_mask" in features and rng.random() < 0.75:
        features["attn_mask"] = with_aligned_rows(features["attn_mask"])
    return (*on(device, q, k, v, dout, dlse), features), options


def on(device, *tensors):
    return tuple(x.to(device, non_blocking=not x.is_cuda) for x in tensors)


def on_device(arguments, device):
    return {name: on(device, x)[0] if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
