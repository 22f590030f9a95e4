"""Few queries, many keys: the keys are split into shares, and the shares' results merged."""

from dataclasses import replace

import pytest
import torch
from calls import assert_same_bits, forward, nan_in_fresh_memory
from inputs import FAMILIES, LAYOUTS, Shape, lay_out, make_qkv
from matrix import CAUSAL_MODES, DTYPES, dtype_name
from numerics import check_forward

import flash_ext

BF16 = torch.bfloat16
HEAD_DIMS = (40, 64, 96, 128, 192, 256)
# Few tiles, many keys; the last share is shorter, or under a causal mask empty for some tiles.
SHAPES = [
    Shape(1, 1, 1, 1030, 4096),
    Shape(2, 4, 1, 1, 9001),
    Shape(2, 1, 1, 3000, 2500),
    Shape(1, 3, 3, 70, 2049),
]

pytestmark = pytest.mark.gpus(1)
algorithms = pytest.mark.parametrize("algorithm", ["v2", "v3"])


def is_split(q, k, v, algorithm):
    return flash_ext.explain(q, k, v, algorithm=algorithm).workspace_bytes > 0


@algorithms
@pytest.mark.parametrize("causal", CAUSAL_MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_shapes(algorithm, head_dim, shape, causal):
    q, k, v = make_qkv(replace(shape, head_dim=head_dim), BF16, "cuda")
    assert is_split(q, k, v, algorithm)
    out, lse = forward(q, k, v, causal=causal, algorithm=algorithm)
    check_forward(out, lse, q, k, v, causal=causal)
    alone = forward(q[:1], k[:1], v[:1], causal=causal, algorithm=algorithm)
    assert_same_bits((out[:1], lse[:1]), alone, "the first sequence alone")


@algorithms
@pytest.mark.parametrize("scale", [None, -0.125, 0.0])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_data(algorithm, dtype, family, scale):
    """Maxima that differ between the shares, by little and by more than fp32 can tell in L."""
    q, k, v = make_qkv(Shape(1, 2, 1, 100, 4100, 64), dtype, "cuda", family)
    assert is_split(q, k, v, algorithm)
    options = {"causal": "bottom_right", "scale": scale}
    check_forward(*forward(q, k, v, algorithm=algorithm, **options), q, k, v, **options)


@algorithms
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_layouts(algorithm, dtype, layout):
    q, k, v = (lay_out(x, layout) for x in make_qkv(Shape(1, 2, 1, 130, 2200, 64), dtype, "cuda"))
    assert is_split(q, k, v, algorithm)
    check_forward(*forward(q, k, v, algorithm=algorithm), q, k, v)


@pytest.mark.parametrize("head_dim", [1, 59, 111, 255])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_odd_head_dims(dtype, head_dim):
    q, k, v = make_qkv(Shape(1, 3, 1, 33, 3100, head_dim), dtype, "cuda")
    assert is_split(q, k, v, "v2")
    check_forward(*forward(q, k, v, algorithm="v2"), q, k, v)


@algorithms
@pytest.mark.parametrize("causal", CAUSAL_MODES)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_same_bits(algorithm, dtype, head_dim, causal):
    """In every run, among other sequences and in another place, and with NaN in all memory that torch hands out
    uninitialised, results and workspace alike."""
    q, k, v = make_qkv(Shape(3, 2, 1, 300, 4300, head_dim), dtype, "cuda")
    assert is_split(q, k, v, algorithm)
    options = {"causal": causal, "algorithm": algorithm}
    first = forward(q, k, v, **options)
    order = torch.tensor([2, 0, 1, 1] * 20, device="cuda")
    with nan_in_fresh_memory():
        for i in range(3):
            assert_same_bits(forward(q, k, v, **options), first, f"repetition {i}")
        moved = forward(q[order], k[order], v[order], **options)
    assert_same_bits(moved, [x[order] for x in first], "sequences reordered")


@algorithms
@pytest.mark.parametrize("seqlen_q", [1, 300, 1900, 4000])
@pytest.mark.parametrize("seqlen_k", [1023, 2047, 2048, 10000])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_scratch_is_what_readme_says(algorithm, head_dim, seqlen_q, seqlen_k):
    """To the float, which also shows into how many shares the keys are split; the batch has no say in it."""
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    for batch in (1, 3):
        shape = Shape(batch, 4, 2, seqlen_q, seqlen_k, head_dim)
        plan = flash_ext.explain(*make_qkv(shape, BF16, "cuda"), algorithm=algorithm)
        padded = next(d for d in ((64, 128, 256) if algorithm == "v2" else HEAD_DIMS[1:]) if d >= head_dim)
        slots, min_keys = (2 * multiprocessors, 512) if algorithm == "v2" else (multiprocessors, 1024)
        tiles = shape.heads * -(-seqlen_q // plan.block_m)
        splits = min(slots // tiles, seqlen_k // min_keys)
        if algorithm == "v2" and (seqlen_k * padded < 128 * 1024 or 2 * tiles > multiprocessors):
            splits = 1
        expected = 4 * splits * batch * shape.heads * seqlen_q * (padded + 2) if splits > 1 else 0
        assert plan.workspace_bytes == expected
