"""General attention on v3: what it takes, alone and mixed, at the edges of its tiles, and what it refuses."""

import itertools
import math
import random

import pytest
import torch
from calls import assert_same_bits
from general_cases import call, check_call, check_forward, on_device
from inputs import FAMILIES, Shape, make_qkv
from matrix import CAUSAL_MODES, HALF_DTYPES, dtype_name
from v3_cases import COMBINATIONS, FEATURES, draw_case, draw_features, draw_gradient_case

import flash_ext

BF16 = torch.bfloat16

pytestmark = pytest.mark.hopper
v3 = pytest.mark.parametrize("algorithm", ["v3"])


@v3
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("names", COMBINATIONS, ids="+".join)
def test_combination(device, algorithm, names, seed):
    (q, k, v, _), features, options = draw_case(f"{seed}{names}", names, device)
    check_forward(q, k, v, features, algorithm=algorithm, **options)


@v3
def test_random_combination(device, algorithm, fuzz_seed):
    names = random.Random(fuzz_seed).choice(COMBINATIONS)
    (q, k, v, _), features, options = draw_case(2_000_000 + fuzz_seed, names, device)
    check_forward(q, k, v, features, algorithm=algorithm, **options)


@v3
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("names", [*COMBINATIONS[:4], FEATURES], ids="+".join)
def test_gradients(device, algorithm, names, seed):
    """Forward and backward of v3; slopes have a gradient, which the backward leaves to v2."""
    algorithm = "auto" if "alibi" in names else algorithm
    rng = random.Random(f"gradients{seed}")
    _, tensors, features = draw_gradient_case(rng, names, device)
    check_call(*tensors, features, algorithm=algorithm, causal=rng.choice(CAUSAL_MODES))


@v3
@pytest.mark.parametrize("causal", CAUSAL_MODES)
@pytest.mark.parametrize("window", [(0, 0), (63, -1), (-1, 64), (128, 0), (200, 100), (2**40, 5)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_window_edges(device, algorithm, head_dim, window, causal):
    """Also rows without keys, before the first key and behind the last; a sink is then all of a row."""
    for seqlen_q, seqlen_k in itertools.product((1, 65, 192, 400, 705), (1, 127, 128, 257, 640)):
        q, k, v = make_qkv(Shape(1, 2, 1, seqlen_q, seqlen_k, head_dim), BF16, device)
        check_forward(q, k, v, {"window": window}, algorithm=algorithm, causal=causal)
        features = {"window": window, "sinks": torch.tensor([0.5, -3.0], device=device)}
        check_forward(q, k, v, features, algorithm=algorithm, causal=causal)


@v3
@pytest.mark.parametrize("window", [(4096, 2), (4095, 0), (4097, 300)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_wide_window(device, algorithm, head_dim, window):
    """Both edges in sight, in the kernel of wide windows and, up to 4,096 keys, in that of narrow ones."""
    q, k, v = make_qkv(Shape(1, 2, 1, 400, 4800, head_dim), BF16, device)
    check_forward(q, k, v, {"window": window}, algorithm=algorithm)


@v3
@pytest.mark.parametrize("causal", CAUSAL_MODES)
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(193, 1), (256, 257), (512, 1024), (961, 127)])
def test_short_kernel(device, algorithm, seqlen_q, seqlen_k, causal):
    """At head_dim 64 short sequences have tiles of 256 rows, as in plain calls."""
    q, k, v = make_qkv(Shape(1, 24, 8, seqlen_q, seqlen_k, 64), BF16, device)
    features = {"sinks": torch.linspace(-3.0, 3.0, 24, device=device)}
    assert flash_ext.explain(q, k, v, algorithm=algorithm, **features).block_m == 256
    check_forward(q, k, v, features, algorithm=algorithm, causal=causal)


@v3
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=dtype_name)
@pytest.mark.parametrize("softcap", [0.01, 1.0, 30.0, 500.0])
@pytest.mark.parametrize("family", [*FAMILIES])
def test_softcap_on_data(device, algorithm, family, softcap, dtype):
    """Scores around the cap, far below and far beyond it, some warps' so and some not."""
    for head_dim, seqlen_k in itertools.product((64, 128), (257, 1500)):
        q, k, v = make_qkv(Shape(1, 2, 2, 199, seqlen_k, head_dim), dtype, device, family)
        check_forward(q, k, v, {"softcap": softcap}, algorithm=algorithm, causal="bottom_right")


@v3
@pytest.mark.parametrize("names", COMBINATIONS[:4], ids="+".join)
@pytest.mark.parametrize("family", [*FAMILIES])
def test_data_of_many_blocks(device, algorithm, family, names):
    """Weights that are tried by the maximum so far, and stand in no block, in some, and in all."""
    rng = random.Random(f"{family}{names}")
    for head_dim, scale in itertools.product((64, 128), (0.125, -0.125)):
        shape = Shape(1, 4, 2, 300, 1500, head_dim)
        q, k, v = make_qkv(shape, BF16, device, family)
        features = on_device(draw_features(names, rng, shape), device)
        check_forward(q, k, v, features, algorithm=algorithm, causal=rng.choice(CAUSAL_MODES), scale=scale)


@v3
@pytest.mark.parametrize("names", [*COMBINATIONS[:4], FEATURES], ids="+".join)
@pytest.mark.parametrize("scale", [0.0, 0.01, -1.0])
def test_scales(device, algorithm, scale, names):
    rng = random.Random(7)
    shape = Shape(2, 2, 1, 150, 300, 64)
    q, k, v = make_qkv(shape, BF16, device)
    features = on_device(draw_features(names, rng, shape), device)
    check_forward(q, k, v, features, algorithm=algorithm, causal="bottom_right", scale=scale)


@v3
def test_many_tiles_repeat_to_the_bit(device, algorithm):
    """Several rounds of the persistent grid, where warpgroups pass over blocks on both sides."""
    shape = Shape(2, 12, 3, 2500, 3000, 64)
    for head_dim in (64, 128):
        q, k, v = make_qkv(shape.with_(head_dim=head_dim), BF16, device)
        for window in ((300, 0), (100, 150), (1000, -1)):
            features = {"window": window, "softcap": 20.0, "sinks": torch.randn(12, device=device)}
            first = call(q, k, v, features, algorithm=algorithm)
            for _ in range(20):
                assert_same_bits(call(q, k, v, features, algorithm=algorithm), first, str(window))
        check_forward(q[:1, :4], k[:1, :1], v[:1, :1], {"window": (300, 0)}, algorithm=algorithm)


@v3
def test_neighbours_are_not_read(device, algorithm):
    """Keys outside every window may be NaN where whole blocks of them are skipped."""
    q, k, v = make_qkv(Shape(1, 1, 1, 128, 1024, 64), BF16, device)
    features = {"window": (200, 0)}
    expected = call(q, k, v, features, algorithm=algorithm)
    k[:, :, :512], v[:, :, :512] = math.nan, math.nan
    assert_same_bits(call(q, k, v, features, algorithm=algorithm), expected, "out, lse")


REFUSED = {
    "attn_mask": {"attn_mask": torch.zeros(10, 12)},
    "a softcap of 1e-4 to 1e4": {"softcap": 1e6},
}


@v3
@pytest.mark.parametrize("name", REFUSED)
def test_refused(device, algorithm, name):
    q, k, v = make_qkv(Shape(2, 4, 2, 10, 12, 64), BF16, device)
    features = on_device(REFUSED[name], device)
    if name == "attn_mask":
        features["attn_mask"] = features["attn_mask"].expand(2, 4, 10, 12)
    with pytest.raises(RuntimeError, match=rf"flash_ext\.general_forward: algorithm 'v3' .*{name}"):
        call(q, k, v, features, algorithm=algorithm)
    assert_same_bits(call(q, k, v, features, algorithm="auto"), call(q, k, v, features), "algorithm='auto'")


@pytest.mark.parametrize(
    ("shape", "dtype", "rule"),
    [
        (Shape(head_dim=136), BF16, "needs a head_dim of at most 128"),
        (Shape(head_dim=60), BF16, "needs a head_dim that is a multiple of 8"),
        (Shape(), torch.float32, "needs float16 or bfloat16"),
        (Shape(seqlen_k=0), BF16, "needs keys"),
    ],
    ids=lambda x: str(x).removeprefix("torch."),
)
def test_refused_tensors(shape, dtype, rule):
    q, k, v = make_qkv(shape, dtype, "cuda")
    with pytest.raises(RuntimeError, match=f"algorithm 'v3' {rule}"):
        call(q, k, v, {"sinks": torch.zeros(2, device="cuda")}, algorithm="v3")


def test_auto_takes_v3_and_explain_says_so():
    q, k, v = make_qkv(Shape(1, 2, 1, 300, 300, 64), BF16, "cuda")
    features = {"window": (100, 0)}
    results = [call(q, k, v, features, algorithm=name) for name in ("auto", "v3")]
    assert_same_bits(*results, "algorithm='auto'")
    explanation = flash_ext.explain(q, k, v, **features)
    assert (explanation.algorithm, explanation.backward) == ("v3", "v3")
    explanation = flash_ext.explain(q, k, v, softcap=2.0, dropout_p=0.1)
    assert (explanation.algorithm, explanation.backward) == ("v3", "v2")
    explanation = flash_ext.explain(q, k, v, softcap=2.0, attn_mask=torch.zeros(300, 300, device="cuda"))
    assert explanation.algorithm == "v2"
    assert any(x.startswith("v3 needs an attn_mask in bool or q's dtype") for x in explanation.reasons)
