"""attn_mask in v3's forward: bool and float of q's dtype, every broadcast, alone and with the other features."""

import functools
import itertools
import math
import random

import pytest
import torch
from calls import assert_same_bits
from general_cases import call, check_call, check_forward
from inputs import Shape, make_qkv, with_aligned_rows
from matrix import CAUSAL_MODES, HALF_DTYPES, dtype_name
from v3_cases import COMBINATIONS, MASK_SHAPES, draw_case, draw_gradient_case, make_mask

import flash_ext

BF16 = torch.bfloat16
KINDS = ("bool", "float")

pytestmark = pytest.mark.hopper
v3 = pytest.mark.parametrize("algorithm", ["v3"])
kinds = pytest.mark.parametrize("kind", KINDS)
head_dims = pytest.mark.parametrize("head_dim", [64, 128])


@v3
@kinds
@head_dims
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=dtype_name)
@pytest.mark.parametrize("letters", MASK_SHAPES)
def test_broadcasts(device, algorithm, letters, dtype, head_dim, kind):
    rng = random.Random(f"{letters}{dtype}{head_dim}{kind}")
    for seqlen_q, seqlen_k in ((150, 300), (457, 129), (1, 640)):
        shape = Shape(2, 4, 2, seqlen_q, seqlen_k, head_dim)
        q, k, v = make_qkv(shape, dtype, device)
        mask = make_mask(kind, letters, shape, dtype, device, hidden=rng.choice([0.0, 0.3, 0.95]))
        for causal in ("none", "bottom_right"):
            check_forward(q, k, v, {"attn_mask": mask}, algorithm=algorithm, causal=causal)


@v3
@kinds
@pytest.mark.parametrize("has_dropout", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("names", [(), *COMBINATIONS], ids="+".join)
def test_combination(device, algorithm, names, seed, has_dropout, kind):
    (q, k, v, _), features, options = draw_case(f"mask{seed}{names}{kind}{has_dropout}", names, device)
    rng = random.Random(f"{seed}{names}")
    shape = Shape(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3])
    mask = make_mask(kind, rng.choice(MASK_SHAPES), shape, q.dtype, device, rng.choice([0.0, 0.3, 0.95]))
    features["attn_mask"] = mask
    if has_dropout:
        features |= {"dropout_p": [0.1, 0.5][seed % 2], "rng_state": torch.tensor([seed, 77], device=device)}
    check_forward(q, k, v, features, algorithm=algorithm, **options)


@v3
@kinds
@head_dims
def test_edges(device, algorithm, head_dim, kind):
    """Around the ends of blocks and tiles, with every causal mask."""
    for seqlen_q, seqlen_k in itertools.product((1, 65, 192, 400, 705), (2, 16, 127, 128, 257, 640)):
        shape = Shape(1, 2, 1, seqlen_q, seqlen_k, head_dim)
        q, k, v = make_qkv(shape, BF16, device)
        mask = make_mask(kind, "11qk", shape, BF16, device)
        for causal in CAUSAL_MODES:
            check_forward(q, k, v, {"attn_mask": mask}, algorithm=algorithm, causal=causal)


@v3
@kinds
@head_dims
def test_rows_without_keys(device, algorithm, head_dim, kind):
    shape = Shape(2, 2, 2, 300, 400, head_dim)
    q, k, v = make_qkv(shape, BF16, device)
    hidden = torch.zeros(1, 1, 300, 400, dtype=torch.bool, device=device)
    hidden[:, :, 3:5], hidden[:, :, 64:192], hidden[:, :, 250:, 128:], hidden[:, :, 299] = True, True, True, True
    mask = ~hidden if kind == "bool" else torch.zeros(hidden.shape, device=device).masked_fill(hidden, -math.inf)
    mask = with_aligned_rows(mask if kind == "bool" else mask.to(BF16))
    for features in ({}, {"sinks": torch.tensor([0.5, -3.0], device=device)}):
        out, lse = check_forward(q, k, v, {"attn_mask": mask, **features}, algorithm=algorithm)
        assert out[:, :, 64:192].abs().max().item() == 0
        if not features:
            assert (lse[:, :, 64:192] == -math.inf).all()


@v3
@head_dims
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=dtype_name)
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}, {"scale": -0.3}, {"scale": 0.0}], ids=str)
def test_least_finite_numbers(device, algorithm, options, dtype, head_dim):
    """The usual stand-in for -inf: rows that have nothing else see all of them alike."""
    options = dict(options)
    scale = options.pop("scale", None)
    q, k, v = make_qkv(Shape(1, 2, 2, 200, 300, head_dim), dtype, device)
    mask = torch.zeros(1, 1, 200, 300, dtype=dtype, device=device)
    mask.masked_fill_(torch.rand(mask.shape, device=device) < 0.5, torch.finfo(dtype).min)
    mask[:, :, 100:140] = torch.finfo(dtype).min
    out, _ = check_forward(q, k, v, {"attn_mask": with_aligned_rows(mask), **options}, algorithm=algorithm, scale=scale)
    if dtype == BF16:  # whose least number takes in all scores
        expected = v.float().mean(2, keepdim=True).expand(-1, -1, 40, -1)
        torch.testing.assert_close(out[:, :, 100:140].float(), expected, rtol=0.01, atol=1e-3)


@v3
@kinds
@head_dims
def test_many_tiles_repeat_to_the_bit(device, algorithm, head_dim, kind):
    shape = Shape(2, 12, 3, 2500, 3008, head_dim)
    q, k, v = make_qkv(shape, BF16, device)
    for letters, causal, left in (("b1qk", "none", -1), ("1hqk", "bottom_right", 300), ("b11k", "none", -1)):
        window = (left, -1)
        features = {"attn_mask": make_mask(kind, letters, shape, BF16, device), "window": window}
        first = call(q, k, v, features, algorithm=algorithm, causal=causal)
        for _ in range(15):
            assert_same_bits(call(q, k, v, features, algorithm=algorithm, causal=causal), first, letters)
        some = [features["attn_mask"][-1:], features["attn_mask"][-1:, -4:]][features["attn_mask"].shape[1] > 1]
        part = {"attn_mask": some, "window": window}
        check_forward(q[-1:, -4:], k[-1:, -1:], v[-1:, -1:], part, algorithm=algorithm, causal=causal)


@v3
@kinds
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("names", [(), ("softcap",), ("alibi", "sinks")], ids="+".join)
def test_gradients(device, algorithm, names, seed, kind):
    """v3's forward with the backward that "auto" takes; rows of the mask stay aligned in autograd's copy of it."""
    rng = random.Random(f"gradients{seed}")
    shape, tensors, features = draw_gradient_case(rng, names, device, lengths_k=range(16, 321, 16))
    features["attn_mask"] = make_mask(kind, "b1qk", shape, BF16, device)
    check_call(*tensors, features, algorithm="auto", causal=rng.choice(CAUSAL_MODES))


REFUSED = {
    "needs an attn_mask in bool or q's dtype": lambda zeros: zeros(40, 48, dtype=torch.float32),
    "needs an attn_mask whose keys lie side by side": lambda zeros: zeros(48, 40, dtype=BF16).mT,
    "needs an attn_mask with rows that begin at multiples of 16 bytes": lambda zeros: zeros(40, 49, dtype=BF16)[:, 1:],
    "needs an attn_mask with rows that begin": lambda zeros: zeros(40, 52, dtype=BF16)[:, :48],
    "needs an attn_mask with rows": lambda zeros: (~zeros(40, 56, dtype=torch.bool))[:, :48],
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refused(reason):
    q, k, v = make_qkv(Shape(2, 4, 2, 40, 48, 64), BF16, "cuda")
    features = {"attn_mask": REFUSED[reason](functools.partial(torch.zeros, device="cuda"))[None, None]}
    with pytest.raises(RuntimeError, match=rf"flash_ext\.general_forward: algorithm 'v3' {reason}"):
        call(q, k, v, features, algorithm="v3")
    assert_same_bits(call(q, k, v, features, algorithm="auto"), call(q, k, v, features), "algorithm='auto'")
    assert any(reason in x for x in flash_ext.explain(q, k, v, **features).reasons)


@kinds
def test_auto_takes_v3_and_explain_says_so(kind):
    shape = Shape(1, 2, 1, 300, 304, 64)
    q, k, v = make_qkv(shape, BF16, "cuda")
    features = {"attn_mask": make_mask(kind, "11qk", shape, BF16, "cuda")}
    assert_same_bits(*(call(q, k, v, features, algorithm=name) for name in ("auto", "v3")), "algorithm='auto'")
    assert flash_ext.explain(q, k, v, **features).algorithm == "v3"
