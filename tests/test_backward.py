"""Gradients over dtypes, head dimensions, lengths, head groups and data; the operator and autograd."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from calls import (
    ALGORITHMS,
    BACKWARD_ALGORITHMS,
    assert_same_bits,
    assert_subset_of_gradients,
    backward,
    forward,
    forward_backward,
)
from inputs import BIASED_FAMILIES, TIGHT_FAMILIES, Shape, make_qkv_dout
from matrix import (
    CAUSAL_MODES,
    DTYPES,
    EDGES,
    HALF_DTYPES,
    HEAD_DIMS,
    HEAD_GROUPS,
    NEEDS,
    dtype_name,
    edge_name,
    heads_name,
    length,
    needs_name,
    tile_edge,
)
from numerics import (
    TIGHT_BACKWARD,
    assert_tight,
    check_gradients,
    naive_gradients,
    reference_gradients,
    relative_error,
)

import flash_ext


def check(q, k, v, dout, *, dlse=None, algorithm="auto", deterministic=False, tile=None, **options):
    _, _, *gradients = forward_backward(
        q, k, v, dout, dlse=dlse, algorithm=algorithm, deterministic=deterministic, tile=tile, **options
    )
    check_gradients(gradients, q, k, v, dout, dlse=dlse, **options)


@pytest.mark.parametrize("causal", CAUSAL_MODES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("algorithm", BACKWARD_ALGORITHMS)
def test_head_dim(device, algorithm, dtype, head_dim, causal):
    shape = Shape(2, 2, 2, length((2, 5), device), length((3, 3), device), head_dim)
    check(*make_qkv_dout(shape, dtype, device), causal=causal, algorithm=algorithm)


@pytest.mark.parametrize("causal", CAUSAL_MODES)
@pytest.mark.parametrize("head_dim", [1, 40, 64, 256])
def test_fp64(head_dim, causal):
    check(*make_qkv_dout(Shape(2, 4, 2, 37, 51, head_dim), torch.float64, "cpu"), causal=causal)


@pytest.mark.parametrize("causal", CAUSAL_MODES)
@pytest.mark.parametrize("k_edge", EDGES, ids=lambda e: "k" + edge_name(e))
@pytest.mark.parametrize("q_edge", EDGES, ids=lambda e: "q" + edge_name(e))
@pytest.mark.parametrize("algorithm", BACKWARD_ALGORITHMS)
def test_lengths_around_tile_edges(device, algorithm, q_edge, k_edge, causal):
    shape = Shape(1, 2, 1, length(q_edge, device), length(k_edge, device), 32)
    check(*make_qkv_dout(shape, torch.bfloat16, device), causal=causal, algorithm=algorithm)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("algorithm", BACKWARD_ALGORITHMS)
def test_every_length_modulo_a_tile(device, algorithm, dtype, head_dim):
    edge = tile_edge(device)
    step = 1 if device == "cpu" else 3
    for seqlen in range(edge + 1, 2 * edge + 1, step):
        tensors = make_qkv_dout(Shape(1, 1, 1, seqlen, seqlen, head_dim), dtype, device)
        check(*tensors, causal="bottom_right", algorithm=algorithm)


@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize("causal", ["none", "bottom_right"])
@pytest.mark.parametrize("heads", HEAD_GROUPS, ids=heads_name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=dtype_name)
@pytest.mark.parametrize("algorithm", BACKWARD_ALGORITHMS)
def test_grouped_heads(device, algorithm, dtype, heads, causal, deterministic):
    """F60: dK and dV are sums over the query heads of their group."""
    shape = Shape(3, *heads, length((1, 3), device), length((2, -3), device), 24)
    tensors = make_qkv_dout(shape, dtype, device)
    check(*tensors, causal=causal, algorithm=algorithm, deterministic=deterministic)


@pytest.mark.parametrize("causal", ["none", "bottom_right"])
@pytest.mark.parametrize("family", TIGHT_FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("algorithm", BACKWARD_ALGORITHMS)
def test_data(device, algorithm, dtype, family, causal):
    shape = Shape(2, 2, 1, length((3, 7), device), length((4, 1), device), 64)
    check(*make_qkv_dout(shape, dtype, device, family), causal=causal, algorithm=algorithm)


@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize("causal", ["none", "bottom_right"])
@pytest.mark.parametrize("with_dlse", [False, True], ids=["", "dlse"])
@pytest.mark.parametrize("family", BIASED_FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("algorithm", BACKWARD_ALGORITHMS)
def test_biased_keys(device, algorithm, dtype, family, with_dlse, causal, deterministic):
    """dQ stays right when keys have a large mean, where rounding dS alone makes it 9% to 340% wrong."""
    seqlen = length((5, 3), device)
    q, k, v, dout = make_qkv_dout(Shape(1, 2, 2, seqlen, seqlen, 64), dtype, device, family)
    dlse = torch.randn(1, 2, seqlen, device=device) if with_dlse else None
    options = {"dlse": dlse, "causal": causal}
    _, _, *gradients = forward_backward(
        q, k, v, dout, algorithm=algorithm, deterministic=deterministic, **options
    )
    check_gradients(gradients, q, k, v, dout, **options)
    _, _, dq, _, _ = reference_gradients(q, k, v, dout, **options)
    limit = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4}[dtype]
    assert relative_error(gradients[0], dq) <= limit


@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("algorithm", BACKWARD_ALGORITHMS)
def test_keys_near_the_largest_fp16(device, algorithm, head_dim, deterministic):
    """Minus their mean, about -31,000, they are beyond fp16's 65,504."""
    seqlen = length((4, 1), device)
    q, k, v, dout = make_qkv_dout(Shape(1, 2, 2, seqlen, seqlen, head_dim), torch.float16, device)
    k = torch.where(k > 0.7, 60000.0, -60000.0).to(k.dtype)
    options = {"dlse": torch.randn(1, 2, seqlen, device=device), "scale": 1e-6}
    gradients = forward_backward(
        q, k, v, dout, algorithm=algorithm, deterministic=deterministic, **options
    )[2:]
    check_gradients(gradients, q, k, v, dout, **options)


@pytest.mark.parametrize("causal", CAUSAL_MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("algorithm", BACKWARD_ALGORITHMS)
def test_shifting_all_keys_leaves_dq(device, algorithm, dtype, causal):
    """Adding one vector to every key changes neither the softmax nor dQ."""
    seqlen = length((4, 1), device)
    q, k, v, dout = make_qkv_dout(Shape(1, 2, 2, seqlen, seqlen, 32), dtype, device, "small_ints")
    q = torch.sign(q)
    dq = forward_backward(q, k, v, dout, causal=causal, algorithm=algorithm)[2]
    shifted = forward_backward(q, k + 8, v, dout, causal=causal, algorithm=algorithm)[2]
    # The CUDA kernels round L, about 65 in units of log2 here, to fp32: 32 eps of every weight.
    allowed = 40 if device == "cuda" and dtype == torch.float32 else 8
    assert relative_error(shifted, dq.double()) <= allowed * torch.finfo(dtype).eps


@pytest.mark.parametrize("scale", [0.0, -0.125, 1e-6, 0.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("algorithm", BACKWARD_ALGORITHMS)
def test_scale(device, algorithm, dtype, scale):
    shape = Shape(1, 2, 2, length((1, 9), device), length((2, 9), device), 32)
    check(*make_qkv_dout(shape, dtype, device), causal="bottom_right", scale=scale, algorithm=algorithm)


@pytest.mark.parametrize("causal", ["none", "bottom_right"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("family", ["randn", "outliers"])
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=dtype_name)
@pytest.mark.parametrize("algorithm", BACKWARD_ALGORITHMS)
def test_tight_gate(device, algorithm, dtype, family, head_dim, causal):
    """Near the rounding floor and well below the naive formula's error."""
    q, k, v, dout = make_qkv_dout(Shape(1, 2, 2, 192, 192, head_dim), dtype, device, family)
    gradients = forward_backward(q, k, v, dout, causal=causal, algorithm=algorithm)[2:]
    exact = reference_gradients(q, k, v, dout, causal=causal)[2:]
    naive = naive_gradients(q, k, v, dout, causal=causal)
    for name, *results in zip(("dq", "dk", "dv"), gradients, exact, naive, strict=True):
        assert_tight(*results, TIGHT_BACKWARD, name)


@pytest.mark.parametrize("tile", [(1, 1), (3, 5), (16, 48), (48, 16), (128, 32)], ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("causal", CAUSAL_MODES)
def test_tile_shapes(causal, tile):
    for seqlens in ((50, 61), (61, 50), (5, 3)):
        check(*make_qkv_dout(Shape(1, 2, 1, *seqlens, 20), torch.float32, "cpu"), causal=causal, tile=tile)


# ---- what is asked for and what is given ---------------------------------------------------------


@pytest.mark.parametrize("causal", CAUSAL_MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("algorithm", BACKWARD_ALGORITHMS)
def test_gradient_of_lse(device, algorithm, dtype, causal):
    """F49: the gradient of the LSE alone, and beside that of out."""
    seqlen_q, seqlen_k = length((2, 3), device), length((1, 5), device)
    q, k, v, dout = make_qkv_dout(Shape(2, 4, 2, seqlen_q, seqlen_k, 40), dtype, device)
    dlse = torch.randn(2, 4, seqlen_q, device=device)
    check(q, k, v, dout, dlse=dlse, causal=causal, algorithm=algorithm)
    check(q, k, v, torch.zeros_like(dout), dlse=dlse, causal=causal, algorithm=algorithm)


@pytest.mark.parametrize("needs", NEEDS, ids=needs_name)
@pytest.mark.parametrize("heads", [(2, 2), (4, 1)], ids=heads_name)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("algorithm", BACKWARD_ALGORITHMS)
def test_subsets_of_gradients(device, algorithm, dtype, heads, needs):
    """F48: each gradient is the same whatever else is asked for; what is not asked for is empty."""
    shape = Shape(2, *heads, length((2, 3), device), length((1, 5), device), 40)
    q, k, v, dout = make_qkv_dout(shape, dtype, device)
    options = {"causal": "bottom_right", "algorithm": algorithm, "deterministic": True}
    assert_subset_of_gradients(q, k, v, dout, needs, **options)


@pytest.mark.parametrize("needs", NEEDS, ids=needs_name)
@pytest.mark.parametrize("through", ["out", "lse", "both"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_autograd_is_the_operator(device, algorithm, through, needs):
    """F48, F49: any subset of inputs, through any subset of results."""
    shape = Shape(2, 4, 2, length((2, 3), device), length((1, 5), device), 40)
    q, k, v, dout = make_qkv_dout(shape, torch.bfloat16, device)
    dlse = torch.randn(shape.q[:3], device=device)
    leaves = [x.clone().requires_grad_(need) for x, need in zip((q, k, v), needs, strict=True)]
    out, lse = forward(*leaves, causal="bottom_right", algorithm=algorithm, deterministic=True)
    results = {"out": ([out], [dout]), "lse": ([lse], [dlse]), "both": ([out, lse], [dout, dlse])}[through]
    gradients = torch.autograd.grad(results[0], [x for x in leaves if x.requires_grad], results[1])

    expected = backward(
        torch.zeros_like(dout) if through == "lse" else dout,
        *(q, k, v, out.detach(), lse.detach()),
        dlse=None if through == "out" else dlse,
        causal="bottom_right",
        algorithm=algorithm,
        deterministic=True,
    )
    expected = [x for x, need in zip(expected, needs, strict=True) if need]
    assert_same_bits(gradients, expected, f"autograd through {through}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_python_interface_gradients(device, dtype):
    q, k, v, dout = make_qkv_dout(Shape(3, 1, 1, 29, 31, 16), dtype, device)
    leaves = [x[:, 0].clone().requires_grad_() for x in (q, k, v)]
    flash_ext.flash_attention(*leaves, causal=True).backward(dout[:, 0])
    check_gradients([x.grad[:, None] for x in leaves], q, k, v, dout, causal="bottom_right")


def test_no_gradient_when_none_is_wanted(device):
    q, k, v, _ = make_qkv_dout(Shape(), torch.float32, device)
    out, lse = forward(q, k, v)
    assert not out.requires_grad
    assert not lse.requires_grad
    with torch.no_grad():
        out, lse = forward(q.requires_grad_(), k, v)
    assert not out.requires_grad
    with torch.inference_mode():
        assert forward(q, k, v)[0].is_inference()


def test_double_backward_says_what_is_missing(device):
    """F53: no silent zeros where the second derivative should be."""
    leaves = [x.requires_grad_() for x in make_qkv_dout(Shape(), torch.float32, device)[:3]]
    out, _ = forward(*leaves)
    (dq,) = torch.autograd.grad(out.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match=r"not differentiable"):
        torch.autograd.grad(dq.sum(), leaves)


def test_forward_mode_says_what_is_missing(device):
    """No silent zero tangent."""
    q, k, v, tangent = make_qkv_dout(Shape(), torch.float32, device)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="jvp is not implemented"):
        forward(forward_ad.make_dual(q, tangent), k, v)


def test_inputs_are_left_alone(device):
    tensors = make_qkv_dout(Shape(2, 4, 2, 70, 80, 40), torch.bfloat16, device)
    before = [x.clone() for x in tensors]
    forward_backward(*tensors, causal="bottom_right")
    assert_same_bits(tensors, before, "inputs after the call")
