"""block_mask in v3's forward: what is off is skipped, whichever warpgroups of a tile see what."""

import itertools
import math
import random

import pytest
import torch
from calls import assert_same_bits
from general_cases import call, check_call, check_forward, on_device
from inputs import Shape, make_qkv
from matrix import CAUSAL_MODES, HALF_DTYPES, dtype_name
from v3_cases import COMBINATIONS, draw_case, draw_gradient_case

import flash_ext

BF16 = torch.bfloat16
SIZES = (64, 128, 256)

pytestmark = pytest.mark.hopper
v3 = pytest.mark.parametrize("algorithm", ["v3"])
head_dims = pytest.mark.parametrize("head_dim", [64, 128])
block_sizes = pytest.mark.parametrize("size", SIZES)


def num_blocks(shape, size):
    return -(-shape.seqlen_q // size), -(-shape.seqlen_k // size)


def draw_blocks(rng, shape, size=None, density=None):
    """A mask for each (batch, head), or fewer."""
    torch.manual_seed(rng.randrange(1 << 30))
    size = rng.choice(SIZES) if size is None else size
    density = rng.choice([0.0, 0.1, 0.3, 0.6, 0.9]) if density is None else density
    leading = rng.choice([1, shape.batch]), rng.choice([1, shape.heads])
    blocks = torch.rand(*leading, *num_blocks(shape, size)) < density
    if rng.random() < 0.3:  # other strides
        blocks = blocks.transpose(-1, -2).contiguous().transpose(-1, -2)
    return {"block_mask": blocks, "block_size": size}


@v3
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("names", [(), *COMBINATIONS], ids="+".join)
def test_combination(device, algorithm, names, seed):
    (q, k, v, _), features, options = draw_case(f"blocks{seed}{names}", names, device)
    shape = Shape(*q.shape[:2], k.shape[1], q.shape[2], k.shape[2], q.shape[3])
    features |= on_device(draw_blocks(random.Random(seed), shape), device)
    check_forward(q, k, v, features, algorithm=algorithm, **options)


@v3
@head_dims
@block_sizes
def test_edges(device, algorithm, size, head_dim):
    """Lengths around tiles and blocks, from nothing that is on to everything."""
    rng = random.Random(size + head_dim)
    for seqlen_q, seqlen_k in itertools.product((1, 65, 192, 400, 705), (1, 64, 65, 129, 257, 640)):
        shape = Shape(2, 2, 1, seqlen_q, seqlen_k, head_dim)
        q, k, v = make_qkv(shape, BF16, device)
        for causal in CAUSAL_MODES:
            features = draw_blocks(rng, shape, size)
            if rng.random() < 0.5:
                features["sinks"] = torch.randn(2)
            check_forward(q, k, v, on_device(features, device), algorithm=algorithm, causal=causal)


def striped(rows, columns, pattern):
    i, j = torch.arange(rows)[:, None], torch.arange(columns)
    return {
        "nothing": (i + j) < 0,
        "everything": (i + j) >= 0,
        "diagonal": i == j,
        "first": (j == 0) & (i >= 0),
        "last": (j == columns - 1) & (i >= 0),
        "one row": (i == rows // 2) & (j >= 0),
        "all but a row": (i != rows // 2) & (j >= 0),
        "checkerboard": (i + j) % 2 == 0,
        "one each": (j % rows) == i,  # many blocks in a row that only other warpgroups see
        "long runs": (j // 7) % 3 == i % 3,
        "halves": (j < columns // 2) == (i % 2 == 0),
        "a few": (i * 7 + j * 3) % 11 == 0,
    }[pattern][None, None]


PATTERNS = (
    "nothing", "everything", "diagonal", "first", "last", "one row", "all but a row", "checkerboard", "one each",
    "long runs", "halves", "a few",
)  # fmt: skip


@v3
@head_dims
@block_sizes
@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns(device, algorithm, pattern, size, head_dim):
    """Warpgroups that begin, end and pause apart, for longer than there are buffers."""
    for seqlen_q, seqlen_k in ((384, 2500), (1000, 1337)):
        shape = Shape(1, 2, 1, seqlen_q, seqlen_k, head_dim)
        q, k, v = make_qkv(shape, BF16, device)
        features = on_device({"block_mask": striped(*num_blocks(shape, size), pattern), "block_size": size}, device)
        for causal in ("none", "bottom_right"):
            out, lse = check_forward(q, k, v, features, algorithm=algorithm, causal=causal)
            if pattern == "nothing":
                assert out.abs().max().item() == 0
                assert (lse == -math.inf).all()


@v3
@head_dims
@block_sizes
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=dtype_name)
@pytest.mark.parametrize("rises", [1.0, 4.0, 40.0])
def test_scores_that_rise_from_block_to_block(device, algorithm, dtype, size, head_dim, rises):
    """Blocks are taken from the last to the first, and most have a maximum above those before."""
    shape = Shape(1, 2, 1, 400, 2000, head_dim)
    q, k, v = make_qkv(shape, dtype, device)
    k = k.abs() * torch.linspace(rises, 0.1, shape.seqlen_k, device=device).to(dtype)[:, None]
    rng = random.Random(size)
    for signed, scale in itertools.product((q.abs(), -q.abs(), q), (None, -0.125)):
        features = on_device(draw_blocks(rng, shape, size, 0.6), device)
        for causal in ("none", "bottom_right"):
            check_forward(signed, k, v, features, algorithm=algorithm, causal=causal, scale=scale)


@v3
@head_dims
@block_sizes
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=dtype_name)
def test_what_is_off_is_not_read(device, algorithm, dtype, size, head_dim):
    """NaN in a block's K and V reaches the rows that see it, and no others."""
    shape = Shape(1, 2, 1, 1000, 1500, head_dim)
    q, k, v = make_qkv(shape, dtype, device)
    rng = random.Random(size)
    for density in (0.2, 0.5, 0.8):
        features = on_device(draw_blocks(rng, shape, size, density), device)
        blocks = features["block_mask"].expand(1, 2, *num_blocks(shape, size))
        expected = call(q, k, v, features, algorithm=algorithm)
        for n in rng.sample(range(blocks.shape[3]), 3):
            poisoned = [x.clone() for x in (k, v)]
            for x in poisoned:
                x[:, :, n * size : (n + 1) * size] = math.nan
            results = call(q, *poisoned, features, algorithm=algorithm)
            sees = blocks[..., n].repeat_interleave(size, 2)[:, :, : shape.seqlen_q]
            for actual, right in zip(results, expected, strict=True):
                assert torch.equal(actual[~sees], right[~sees])
            assert results[0][sees].isnan().all()


@v3
@head_dims
@block_sizes
def test_many_tiles_repeat_to_the_bit(device, algorithm, size, head_dim):
    """Several rounds of the persistent grid, with tiles of all lengths."""
    shape = Shape(2, 12, 3, 2500, 3000, head_dim)
    q, k, v = make_qkv(shape, BF16, device)
    rng = random.Random(size)
    for density, causal in itertools.product((0.03, 0.25, 0.7), ("none", "bottom_right")):
        features = on_device(draw_blocks(rng, shape, size, density), device)
        first = call(q, k, v, features, algorithm=algorithm, causal=causal)
        for _ in range(10):
            assert_same_bits(call(q, k, v, features, algorithm=algorithm, causal=causal), first, "again")
        out, lse = call(q, k, v, features, algorithm="v2", causal=causal)
        torch.testing.assert_close(first[0], out, rtol=0.02, atol=0.02)
        torch.testing.assert_close(first[1], lse, rtol=1e-4, atol=1e-4)


@v3
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("names", [(), *COMBINATIONS[:4]], ids="+".join)
def test_gradients(device, algorithm, names, seed):
    """v3's forward with the backward that "auto" takes."""
    rng = random.Random(f"gradients{seed}")
    shape, tensors, features = draw_gradient_case(rng, names, device)
    features |= on_device(draw_blocks(rng, shape), device)
    check_call(*tensors, features, algorithm="auto", causal=rng.choice(CAUSAL_MODES))


def lengths(*values):
    return torch.tensor(values, dtype=torch.int32)


REFUSED = {
    "dropout_p": {"dropout_p": 0.1, "rng_state": torch.tensor([1, 2])},
    "lengths": {"seqlens_k": lengths(12, 7)},
}


@v3
@pytest.mark.parametrize("name", REFUSED)
def test_refused(device, algorithm, name):
    q, k, v = make_qkv(Shape(2, 4, 2, 10, 12, 64), BF16, device)
    features = on_device(REFUSED[name] | {"block_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool)}, device)
    with pytest.raises(RuntimeError, match=f"algorithm 'v3' has no kernels with block_mask and .*{name}"):
        call(q, k, v, features, algorithm=algorithm)
    assert_same_bits(call(q, k, v, features, algorithm="auto"), call(q, k, v, features), "algorithm='auto'")


def test_auto_takes_v3_and_explain_says_so():
    q, k, v = make_qkv(Shape(1, 2, 1, 300, 300, 64), BF16, "cuda")
    features = {"block_mask": torch.rand(1, 1, 3, 3, device="cuda") < 0.5}
    assert_same_bits(*(call(q, k, v, features, algorithm=name) for name in ("auto", "v3")), "algorithm='auto'")
    assert flash_ext.explain(q, k, v, **features).algorithm == "v3"


@pytest.mark.parametrize("size", SIZES)
def test_explain_says_where_tiles_are_counted(size):
    q, k, v = make_qkv(Shape(1, 2, 1, 300, 300, 64), BF16, "cuda")
    blocks = torch.ones(1, 1, *num_blocks(Shape(1, 2, 1, 300, 300, 64), size), dtype=torch.bool, device="cuda")
    features = {"block_mask": blocks, "block_size": size}
    plan = flash_ext.explain(q, k, v, **features)
    assert (plan.block_m, plan.workspace_bytes) == ((192, 0) if size == 64 else (128, 4))
    assert flash_ext.explain(q, k, v, softcap=2.0, **features).workspace_bytes == 0
