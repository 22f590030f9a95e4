"""v3's backward with window, softcap, alibi_slopes and sinks, alone and together, and what it refuses."""

import random

import pytest
import torch
from calls import assert_same_bits
from general_cases import check_backward, draw_features, on_device
from inputs import Shape, make_qkv_dout
from matrix import CAUSAL_MODES, HALF_DTYPES, dtype_name

FEATURES = ("window", "alibi", "softcap", "sinks")
HEAD_DIMS = (64, 128)

v3 = pytest.mark.parametrize("algorithm", ["v3"])


def drawn(seed, names=None):
    """Everything of a call from one number."""
    rng = random.Random(seed)
    group, heads_kv = rng.choice([1, 1, 2, 3]), rng.choice([1, 2])
    length = lambda: rng.choice([1, 17, 64, 65, 127, 128, 129, rng.randint(1, 700)])  # noqa: E731
    head_dim = rng.choice([8, 64, 64, 72, 128, 128])
    shape = Shape(rng.choice([1, 2]), heads_kv * group, heads_kv, length(), length(), head_dim)
    dtype = rng.choice(HALF_DTYPES)
    names = names or rng.sample(FEATURES, rng.randint(1, 4))
    features = draw_features(rng, shape, dtype, names)
    if "window" in names and rng.random() < 0.6:
        features["window"] = (rng.choice([-1, 0, 63, 100, 128, 300]), rng.choice([-1, 0, 64, 130]))
    tensors = make_qkv_dout(shape, dtype, "cpu", rng.choice(["randn", "shifted", "randn3"]))
    dlse = torch.randn(shape.q[:3]) if rng.random() < 0.5 else None
    options = {
        "causal": rng.choice(CAUSAL_MODES),
        "scale": rng.choice([None, 0.3, -0.1]),
        "deterministic": rng.random() < 0.5,
    }
    return tensors, dlse, features, options


def check_drawn(device, algorithm, seed, names=None):
    tensors, dlse, features, options = drawn(seed, names)
    tensors = [x.to(device) for x in tensors]
    dlse = None if dlse is None else dlse.to(device)
    check_backward(*tensors, dlse, on_device(features, device), algorithm=algorithm, **options)


@v3
@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("feature", FEATURES)
def test_feature_alone(device, algorithm, feature, seed):
    check_drawn(device, algorithm, seed, [feature])


@v3
@pytest.mark.parametrize("seed", range(200))
def test_combination(device, algorithm, seed):
    check_drawn(device, algorithm, 1000 + seed)


@v3
@pytest.mark.parametrize("causal", CAUSAL_MODES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=dtype_name)
def test_many_tiles_repeat_to_the_bit(device, algorithm, dtype, head_dim, causal):
    """Deterministic gradients on a full GPU, where key blocks wait for their turns from the window's first on."""
    q, k, v, dout = make_qkv_dout(Shape(3, 12, 4, 1500, 1400, head_dim), dtype, device)
    sinks, slopes = torch.randn(12, device=device), torch.rand(12, device=device)
    for features in (
        {"window": (300, 100), "sinks": sinks},
        {"window": (40, 40), "alibi_slopes": slopes, "sinks": sinks},
        {"softcap": 20.0, "alibi_slopes": slopes, "window": (200, -1), "sinks": sinks},
    ):
        options = {"causal": causal, "window": [-1, -1]} | features
        out, lse = torch.ops.flash_ext.general_forward(q, k, v, algorithm="v2", **options)
        options |= {"deterministic": True, "needs": [True, True, True, False, False, True]}
        runs = [
            torch.ops.flash_ext.general_backward(dout, q, k, v, out, lse, algorithm=name, **options)
            for name in (algorithm,) * 4 + ("v2",)
        ]
        for again in runs[1:-1]:
            assert_same_bits(again, runs[0], "gradients")
        for ours, other in zip(runs[0], runs[-1], strict=True):
            if other.numel():
                assert (ours.double() - other.double()).norm() <= 1e-2 * other.double().norm()


@v3
@pytest.mark.parametrize("needs", range(1, 16))
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_only_wanted_gradients_are_computed(device, algorithm, head_dim, needs):
    q, k, v, dout = make_qkv_dout(Shape(2, 4, 2, 300, 260, head_dim), torch.bfloat16, device)
    options = {"window": [90, 20], "sinks": torch.randn(4, device=device)}
    out, lse = torch.ops.flash_ext.general_forward(q, k, v, algorithm="v2", **options)

    def backward(needs):
        return torch.ops.flash_ext.general_backward(
            dout, q, k, v, out, lse, algorithm=algorithm, deterministic=True, needs=needs, **options
        )

    wanted = [bool(needs >> i & 1) for i in range(3)] + [False, False, needs >= 8]
    everything = backward([True, True, True, False, False, True])
    for is_wanted, actual, expected in zip(wanted, backward(wanted), everything, strict=True):
        if is_wanted:
            assert torch.equal(actual, expected)
        else:
            assert actual.numel() == 0


REFUSED = {
    "attn_mask": ({"attn_mask": (1, 1, 70, 90)}, "attn_mask"),
    "block_mask": ({"block_mask": (1, 1, 1, 1)}, "block_mask"),
    "seqlens_k": ({"seqlens_k": None}, "seqlens_k"),
    "dslopes": ({"alibi_slopes": (4,)}, "the gradient of alibi_slopes"),
    "softcap": ({"softcap": 1e4}, "needs a softcap of 0.001 to 1000"),
}


@pytest.mark.hopper
@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    """By name where v3 was asked for; "auto" takes v2."""
    arguments, reason = REFUSED[case]
    options = {
        name: torch.ones(x, device="cuda", dtype=torch.bool if name == "block_mask" else torch.float32)
        if isinstance(x, tuple)
        else x
        for name, x in arguments.items()
    }
    if case == "seqlens_k":
        options["seqlens_k"] = torch.tensor([50, 90], dtype=torch.int32, device="cuda")
    q, k, v, dout = make_qkv_dout(Shape(2, 4, 2, 70, 90, 64), torch.bfloat16, "cuda")
    out, lse = torch.ops.flash_ext.general_forward(q, k, v, algorithm="v2", **options)
    given = (dout, q, k, v, out, lse)
    with pytest.raises(RuntimeError, match=rf"general_backward: algorithm 'v3' .*{reason}"):
        torch.ops.flash_ext.general_backward(*given, algorithm="v3", **options)
    automatic, v2 = (
        torch.ops.flash_ext.general_backward(*given, algorithm=name, deterministic=True, **options)
        for name in ("auto", "v2")
    )
    assert_same_bits(automatic, v2, "algorithm='auto'")
