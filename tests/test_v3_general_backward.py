"""v3's backward with what it has of general attention, alone and together, and what it refuses."""

import random

import pytest
import torch
from calls import assert_same_bits
from general_cases import GRADIENTS, check_backward, check_repeatable_backward, draw_features
from inputs import Shape, make_qkv_dout
from matrix import CAUSAL_MODES, HALF_DTYPES, dtype_name
from v3_cases import check_drawn_backward

FEATURES = ("window", "alibi", "softcap", "sinks", "block_mask")
HEAD_DIMS = (64, 128)

v3 = pytest.mark.parametrize("algorithm", ["v3"])


def check_drawn(device, algorithm, seed, given=None):
    def draw(rng, shape, dtype):
        names = given or rng.sample(FEATURES, rng.randint(1, 4))
        features = draw_features(rng, shape, dtype, names)
        if "window" in names and rng.random() < 0.6:
            features["window"] = (rng.choice([-1, 0, 63, 100, 128, 300]), rng.choice([-1, 0, 64, 130]))
        return features

    check_drawn_backward(device, algorithm, seed, draw)


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
        {"block_mask": torch.rand(3, 12, 24, 22, device=device) < 0.3, "block_size": 64},
        {"block_mask": torch.rand(1, 1, 12, 11, device=device) < 0.5, "block_size": 128, "window": (500, 200)},
    ):
        check_repeatable_backward(q, k, v, dout, features, algorithm=algorithm, causal=causal)


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


def random_blocks(rng, shape, size, device):
    """A block_mask, broadcast or not, in any order in memory, with whole rows and columns that are off."""
    torch.manual_seed(rng.randrange(1 << 30))
    rows, keys = -(-shape.seqlen_q // size), -(-shape.seqlen_k // size)
    sizes = (rng.choice([1, shape.batch]), rng.choice([1, shape.heads]), rows, keys)
    mask = torch.rand(sizes) < rng.choice([0.1, 0.3, 0.8])
    mask &= torch.rand(rows, 1) < 0.8
    mask &= torch.rand(keys) < 0.8
    order = rng.choice([(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
    inverse = [order.index(i) for i in range(4)]
    return mask.permute(order).contiguous().permute(inverse).to(device)


@v3
@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_block_mask(device, algorithm, head_dim, size, seed):
    """Masks so sparse that tiles have one step or none, and chunks of flags that are all off."""
    rng = random.Random(f"{seed}{size}{head_dim}")
    group, heads_kv = rng.choice([1, 2, 3]), rng.choice([1, 2])
    length = lambda: rng.choice([1, 64, 129, 512, 1024, rng.randint(1, 1600)])  # noqa: E731
    shape = Shape(rng.choice([1, 2]), heads_kv * group, heads_kv, length(), length(), head_dim)
    tensors = make_qkv_dout(shape, rng.choice(HALF_DTYPES), device)
    features = {"block_mask": random_blocks(rng, shape, size, device), "block_size": size}
    if rng.random() < 0.3:
        features["window"] = (rng.choice([-1, 70, 300]), rng.choice([-1, 0, 100]))
    options = {"causal": rng.choice(CAUSAL_MODES), "deterministic": rng.random() < 0.5}
    check_backward(*tensors, None, features, algorithm=algorithm, **options)


@v3
@pytest.mark.parametrize("on", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_block_mask_all_alike(device, algorithm, head_dim, deterministic, on):
    """All off: zeros, also where memory held something else. All on: nothing but the other arguments' meaning."""
    tensors = make_qkv_dout(Shape(2, 4, 2, 700, 900, head_dim), torch.bfloat16, device)
    features = {"block_mask": torch.full((1, 1, 11, 15), on, device=device), "block_size": 64}
    for causal in CAUSAL_MODES:
        options = {"algorithm": algorithm, "causal": causal, "deterministic": deterministic}
        gradients = check_backward(*tensors, None, features, **options)[:3]
        if not on:
            assert all((x == 0).all() for x in gradients)
        elif deterministic:
            without = check_backward(*tensors, None, {"window": (-1, 900)}, **options)[:3]
            assert_same_bits(without, gradients, "gradients")


@v3
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_blocks_that_are_off_are_not_read(device, algorithm, head_dim):
    """Queries in rows of the mask that are off may be NaN."""
    q, k, v, dout = make_qkv_dout(Shape(1, 2, 1, 1024, 640, head_dim), torch.bfloat16, device)
    mask = torch.rand(1, 2, 4, 3, device=device) < 0.5
    mask[:, :, 1] = False
    options = {"block_mask": mask, "block_size": 256}
    out, lse = torch.ops.flash_ext.general_forward(q, k, v, algorithm="v2", **options)
    options |= {"algorithm": algorithm, "deterministic": True}
    expected = torch.ops.flash_ext.general_backward(dout, q, k, v, out, lse, **options)
    for x in (q, dout):
        x[:, :, 256:512] = float("nan")
    actual = torch.ops.flash_ext.general_backward(dout, q, k, v, out, lse, **options)
    assert_same_bits(actual[:3], expected[:3], "gradients")


REFUSED = {
    "attn_mask": ({"attn_mask": (1, 1, 70, 90)}, "bool or q's dtype"),
    "dslopes": ({"alibi_slopes": (4,)}, "the gradient of alibi_slopes"),
    "softcap": ({"softcap": 1e4}, "needs a softcap of 0.001 to 1000"),
}


@pytest.mark.hopper
@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    """By name where v3 was asked for; "auto" takes v2."""
    arguments, reason = REFUSED[case]
    options = {name: torch.ones(x, device="cuda") if isinstance(x, tuple) else x for name, x in arguments.items()}
    q, k, v, dout = make_qkv_dout(Shape(2, 4, 2, 70, 90, 64), torch.bfloat16, "cuda")
    out, lse = torch.ops.flash_ext.general_forward(q, k, v, algorithm="v2", **options)
    given = (dout, q, k, v, out, lse)
    with pytest.raises(RuntimeError, match=rf"general_backward: algorithm 'v3' .*{reason}"):
        torch.ops.flash_ext.general_backward(*given, algorithm="v3", **options)
    automatic, v2 = (
        torch.ops.flash_ext.general_backward(*given, algorithm=name, deterministic=True, **options)
        for name in ("auto", "v2")
    )
    assert_same_bits(automatic, v2, "algorithm='auto'", GRADIENTS)
