"""Forward results of every algorithm over dtypes, head dimensions, lengths, head groups and data."""

import pytest
import torch
from calls import ALGORITHMS, CPU_ALGORITHMS, assert_same_bits, bits, fastest, forward
from inputs import FAMILIES, TIGHT_FAMILIES, Shape, make_qkv
from matrix import (
    CAUSAL_MODES,
    DTYPES,
    EDGES,
    HALF_DTYPES,
    HEAD_DIMS,
    HEAD_GROUPS,
    dtype_name,
    edge_name,
    heads_name,
    length,
    tile_edge,
)
from numerics import (
    TIGHT_FORWARD,
    assert_lse,
    assert_tight,
    causal_argument,
    check_forward,
    naive_attention,
)

import flash_ext
from flash_ext import attention_reference

TILES = ((1, 1), (3, 5), (16, 48), (48, 16), (64, 64), (128, 32))


def check(q, k, v, **options):
    out, lse = forward(q, k, v, **options)
    options.pop("algorithm", None)
    options.pop("tile", None)
    check_forward(out, lse, q, k, v, **options)


@pytest.mark.parametrize("causal", CAUSAL_MODES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_head_dim(device, algorithm, dtype, head_dim, causal):
    shape = Shape(2, 2, 2, length((2, 5), device), length((3, 3), device), head_dim)
    check(*make_qkv(shape, dtype, device), causal=causal, algorithm=algorithm)


@pytest.mark.parametrize("causal", CAUSAL_MODES)
@pytest.mark.parametrize("head_dim", [1, 40, 64, 256])
@pytest.mark.parametrize("algorithm", CPU_ALGORITHMS)
def test_fp64(algorithm, head_dim, causal):
    q, k, v = make_qkv(Shape(2, 4, 2, 37, 51, head_dim), torch.float64, "cpu")
    check(q, k, v, causal=causal, algorithm=algorithm)


@pytest.mark.parametrize("causal", CAUSAL_MODES)
@pytest.mark.parametrize("k_edge", EDGES, ids=lambda e: "k" + edge_name(e))
@pytest.mark.parametrize("q_edge", EDGES, ids=lambda e: "q" + edge_name(e))
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_lengths_around_tile_edges(device, algorithm, q_edge, k_edge, causal):
    """F13 among them: seqlen_q > seqlen_k with a causal mask."""
    shape = Shape(1, 2, 1, length(q_edge, device), length(k_edge, device), 32)
    check(*make_qkv(shape, torch.bfloat16, device), causal=causal, algorithm=algorithm)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_length_modulo_a_tile(device, algorithm, dtype, head_dim):
    """All remainders at once: one batch entry would hide in a mean, so each length is its own call."""
    edge = tile_edge(device)
    step = 1 if device == "cpu" else 3
    for seqlen in range(edge + 1, 2 * edge + 1, step):
        q, k, v = make_qkv(Shape(1, 1, 1, seqlen, seqlen, head_dim), dtype, device)
        check(q, k, v, causal="bottom_right", algorithm=algorithm)


@pytest.mark.parametrize("causal", ["none", "bottom_right"])
@pytest.mark.parametrize("heads", HEAD_GROUPS, ids=heads_name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=dtype_name)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_grouped_heads(device, algorithm, dtype, heads, causal):
    shape = Shape(3, *heads, length((1, 3), device), length((2, -3), device), 24)
    check(*make_qkv(shape, dtype, device), causal=causal, algorithm=algorithm)


@pytest.mark.parametrize("causal", ["none", "bottom_right"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_data(device, algorithm, dtype, family, causal):
    shape = Shape(2, 2, 1, length((3, 7), device), length((4, 1), device), 64)
    check(*make_qkv(shape, dtype, device, family), causal=causal, algorithm=algorithm)


@pytest.mark.parametrize("scale", [0.0, -0.125, 1e-6, 0.5, 2.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_scale(device, algorithm, dtype, scale):
    """F30: negative and zero scales reach every place where a maximum is taken."""
    q, k, v = make_qkv(Shape(1, 2, 2, length((1, 9), device), length((2, 9), device), 32), dtype, device)
    check(q, k, v, causal="bottom_right", scale=scale, algorithm=algorithm)


@pytest.mark.parametrize("causal", ["none", "bottom_right"])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("family", ["randn", "outliers"])
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=dtype_name)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_tight_gate(device, algorithm, dtype, family, head_dim, causal):
    """Near the rounding floor and well below the naive formula's error."""
    q, k, v = make_qkv(Shape(1, 2, 2, 192, 192, head_dim), dtype, device, family)
    exact, exact_lse = attention_reference(q, k, v, causal=causal_argument(causal))
    out, lse = forward(q, k, v, causal=causal, algorithm=algorithm)
    assert_lse(lse, exact_lse)
    assert_tight(out, exact, naive_attention(q, k, v, causal=causal), TIGHT_FORWARD, "out")


@pytest.mark.parametrize("tile", TILES, ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("causal", CAUSAL_MODES)
@pytest.mark.parametrize("algorithm", CPU_ALGORITHMS)
def test_tile_shapes(algorithm, causal, tile):
    """The CPU kernels are right with any tile, also with one larger than the problem."""
    for seqlens in ((50, 61), (61, 50), (5, 3)):
        q, k, v = make_qkv(Shape(1, 2, 1, *seqlens, 20), torch.float32, "cpu")
        check(q, k, v, causal=causal, algorithm=algorithm, tile=tile)


# ---- identities that need no reference -----------------------------------------------------------

EXACT_SHAPE = Shape(1, 2, 2, 70, 152, 48)


@pytest.mark.parametrize("causal", CAUSAL_MODES)
@pytest.mark.parametrize("family", TIGHT_FAMILIES)
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=dtype_name)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_ones_stay_ones(device, algorithm, dtype, family, causal):
    q, k, v = make_qkv(EXACT_SHAPE, dtype, device, family)
    out, _ = forward(q, k, torch.ones_like(v), causal=causal, algorithm=algorithm)
    # In v1 and v2 the largest weight is exactly 1. In v3 it may be rounded, and out with it, once.
    assert (1 - out).abs().max() <= (torch.finfo(dtype).eps / 2 if algorithm == "v3" else 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_one_hot_rows_copy_v(device, algorithm, dtype):
    """Row i attends to key 7 i mod seqlen_k alone, by a gap of 200 in the logits."""
    seqlen_q, seqlen_k = EXACT_SHAPE.seqlen_q, EXACT_SHAPE.seqlen_k
    chosen = 7 * torch.arange(seqlen_q, device=device) % seqlen_k
    _, _, v = make_qkv(EXACT_SHAPE, dtype, device)
    k = torch.eye(seqlen_k, device=device, dtype=dtype).expand(1, 2, -1, -1)
    q = 200 * k[:, :, chosen]
    out, lse = forward(q, k, torch.nn.functional.pad(v, (0, seqlen_k - 48)), scale=1.0, algorithm=algorithm)
    # On a GPU the maximum's own weight is 2^x with the rounding x of 200 log2(e), which shows in the last
    # bits of lse; and fp32 goes through three TF32 products.
    rtol = 4 * torch.finfo(torch.float32).eps if device == "cuda" else 0
    if dtype == torch.float32:
        torch.testing.assert_close(out[..., :48], v[:, :, chosen], rtol=rtol, atol=0)
    else:
        assert_same_bits([out[..., :48]], [v[:, :, chosen]], "one-hot rows")
    torch.testing.assert_close(lse, torch.full_like(lse, 200), rtol=rtol, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_zero_queries_average_v(device, algorithm, dtype):
    q, k, v = make_qkv(EXACT_SHAPE, dtype, device, "small_ints")
    out, _ = forward(torch.zeros_like(q), k, v, algorithm=algorithm)
    mean = v.double().mean(2, keepdim=True).expand_as(out)
    torch.testing.assert_close(out.double(), mean, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_unit_columns_of_v_show_the_weights(device, algorithm, dtype):
    """V = I returns the softmax itself: every weight lands at its own key."""
    q, k, _ = make_qkv(Shape(1, 2, 2, 70, 152, 48), dtype, device)
    q, k = (torch.nn.functional.pad(x, (0, 152 - 48)) for x in (q, k))
    v = torch.eye(152, device=device, dtype=dtype).expand(1, 2, -1, -1)
    out, _ = forward(q, k, v, causal="bottom_right", algorithm=algorithm)
    exact, _ = attention_reference(q, k, v, causal=True)
    torch.testing.assert_close(out.double(), exact, rtol=max(2e-5, torch.finfo(dtype).eps), atol=1e-7)
    assert (out[exact == 0] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_order_of_keys_does_not_matter(device, algorithm, dtype):
    q, k, v = make_qkv(EXACT_SHAPE, dtype, device)
    order = torch.randperm(k.shape[2], device=device)
    for q_, k_, v_ in ((q, k, v), (q, k[:, :, order], v[:, :, order])):
        check(q_, k_, v_, algorithm=algorithm)


# ---- the Python interface adds nothing and loses nothing -----------------------------------------


@pytest.mark.parametrize("causal", [False, True, "bottom_right", "top_left"])
@pytest.mark.parametrize("algorithm", ["auto", *ALGORITHMS])
def test_python_interface_is_the_operator(device, algorithm, causal):
    q, k, v = make_qkv(Shape(2, 4, 2, 33, 47, 16), torch.float16, device)
    mode = {False: "none", True: "bottom_right"}.get(causal, causal)
    direct = torch.ops.flash_ext.forward(q, k, v, 0.3, mode, algorithm)
    options = {"causal": causal, "scale": 0.3, "algorithm": algorithm}
    through = flash_ext.flash_attention(q, k, v, return_lse=True, **options)
    assert_same_bits(through, direct, "flash_attention")
    alone = flash_ext.flash_attention(q, k, v, **options)
    assert torch.equal(bits(alone), bits(direct[0]))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_named_algorithms(device, algorithm):
    q, k, v = make_qkv(Shape(2, 4, 2, 33, 47, 16), torch.float16, device)
    named = getattr(flash_ext, f"flash_attention_{algorithm}")(q, k, v, causal=True, return_lse=True)
    general = flash_ext.flash_attention(q, k, v, causal=True, return_lse=True, algorithm=algorithm)
    assert_same_bits(named, general, f"flash_attention_{algorithm}")


def test_algorithm_is_not_ignored(device):
    """v1 rounds its output once for every block of keys, v2 once: in fp32 that shows."""
    q, k, v = make_qkv(Shape(2, 4, 2, 133, 547, 64), torch.float32, device)
    assert not torch.equal(forward(q, k, v, algorithm="v1")[0], forward(q, k, v, algorithm="v2")[0])


@pytest.mark.parametrize("head_dim", [59, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_auto_is_the_fastest(device, dtype, head_dim):
    q, k, v = make_qkv(Shape(2, 4, 2, 133, 147, head_dim), dtype, device)
    expected = fastest(device=device, dtype=dtype, head_dim=head_dim)
    assert flash_ext.explain(q, k, v).algorithm == expected
    assert_same_bits(forward(q, k, v), forward(q, k, v, algorithm=expected), "algorithm='auto'")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_three_dimensions_are_one_head(device, dtype):
    q, k, v = make_qkv(Shape(3, 1, 1, 29, 31, 16), dtype, device)
    four = flash_ext.flash_attention(q, k, v, causal=True, return_lse=True)
    three = flash_ext.flash_attention(q[:, 0], k[:, 0], v[:, 0], causal=True, return_lse=True)
    assert three[1].shape == (3, 29)
    assert_same_bits(three, [x[:, 0] for x in four], "3-D inputs")
