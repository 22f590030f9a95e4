"""Any strides, any storage offset, and nothing outside a view ever counts: compared bit by bit."""

import math

import pytest
import torch
from calls import (
    ALGORITHMS,
    BACKWARD_ALGORITHMS,
    assert_nan_in_fresh_memory_does_not_show,
    assert_same_bits,
    backward,
    forward,
    forward_backward,
)
from inputs import LAYOUTS, Shape, far_apart, lay_out, make_qkv_dout, with_absurd_strides
from matrix import DTYPES, dtype_name, length

import flash_ext

ODD_LAYOUTS = [name for name in LAYOUTS if name != "contiguous"]


def shape_for(device, **changes):
    shape = Shape(2, 4, 2, length((2, 3), device), length((1, 7), device), 40)
    return shape.with_(**changes)


def assert_layout_does_not_matter(tensors, layouts, fill, algorithm="auto"):
    """`tensors` is (q, k, v, dout); `layouts` names the layout of each."""
    options = {"causal": "bottom_right", "deterministic": True, "algorithm": algorithm}
    expected = forward_backward(*tensors, **options)
    placed = [lay_out(x, layout, fill) for x, layout in zip(tensors, layouts, strict=True)]
    assert_same_bits(forward_backward(*placed, **options), expected, f"layouts {layouts}")


@pytest.mark.parametrize("layout", ODD_LAYOUTS)
@pytest.mark.parametrize("head_dim", [40, 64, 111])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_F25_poison_around_every_input(device, algorithm, dtype, head_dim, layout):
    """NaN in all memory that lies between and around the rows of the views."""
    tensors = make_qkv_dout(shape_for(device, head_dim=head_dim), dtype, device)
    assert_layout_does_not_matter(tensors, [layout] * 4, math.nan, algorithm)


@pytest.mark.parametrize("fill", [math.inf, -math.inf, 3e4], ids=["inf", "-inf", "large"])
@pytest.mark.parametrize("layout", ["longer_cache", "gap3", "bshd"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_F25_other_poisons(device, algorithm, dtype, layout, fill):
    tensors = make_qkv_dout(shape_for(device), dtype, device)
    assert_layout_does_not_matter(tensors, [layout] * 4, fill, algorithm)


@pytest.mark.parametrize("tensor", range(4), ids=("q", "k", "v", "dout"))
@pytest.mark.parametrize("layout", ODD_LAYOUTS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_F33_each_input_has_its_own_strides(device, algorithm, layout, tensor):
    """Strides of one tensor used for another would go unnoticed where all are alike."""
    layouts = ["contiguous"] * 4
    layouts[tensor] = layout
    tensors = make_qkv_dout(shape_for(device), torch.bfloat16, device)
    assert_layout_does_not_matter(tensors, layouts, math.nan, algorithm)


@pytest.mark.parametrize("layout", ODD_LAYOUTS)
@pytest.mark.parametrize("algorithm", BACKWARD_ALGORITHMS)
def test_F07_out_has_its_own_strides(device, algorithm, layout):
    """The backward operator reads `out` by the strides of out, not by those of q or dout."""
    q, k, v, dout = make_qkv_dout(shape_for(device), torch.bfloat16, device)
    options = {"algorithm": algorithm, "deterministic": True}
    out, lse = forward(q, k, v, **options)
    expected = backward(dout, q, k, v, out, lse, **options)
    placed = lay_out(out, layout, math.nan)
    assert_same_bits(backward(dout, q, k, v, placed, lse, **options), expected, f"out {layout}")


@pytest.mark.parametrize("tensor", range(4), ids=("q", "k", "v", "dout"))
@pytest.mark.parametrize("dim", range(3), ids=("batch", "heads", "rows"))
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_F01_strides_beyond_32_bits(device, algorithm, dim, tensor):
    tensors = list(make_qkv_dout(Shape(2, 2, 2, 2, 2, 64), torch.bfloat16, device))
    options = {"deterministic": True, "algorithm": algorithm}
    expected = forward_backward(*tensors, **options)
    tensors[tensor] = far_apart(tensors[tensor], dim)
    assert_same_bits(forward_backward(*tensors, **options), expected, "a stride of 2^31 + 64")


@pytest.mark.parametrize("offset", range(1, 9))
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_F35_odd_storage_offsets(device, dtype, offset):
    """v2: of these offsets v3 takes only 8, one of the layouts above."""
    tensors = make_qkv_dout(shape_for(device, head_dim=64), dtype, device)
    options = {"causal": "bottom_right", "deterministic": True, "algorithm": "v2"}
    placed = []
    for x in tensors:
        buffer = torch.full((x.numel() + offset,), math.nan, dtype=dtype, device=device)
        placed.append(buffer[offset:].view(x.shape).copy_(x))
    expected = forward_backward(*tensors, **options)
    assert_same_bits(forward_backward(*placed, **options), expected, f"storage offset {offset}")


@pytest.mark.parametrize("dims", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("which", ["q", "kv", "dout", "all"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=dtype_name)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_F34_expanded_dimensions(device, algorithm, dtype, which, dims):
    """Stride 0 over batch, heads or rows."""
    q, k, v, dout = make_qkv_dout(shape_for(device), dtype, device)

    def expand(x):
        first = x
        for dim in dims:
            first = first.narrow(dim, 0, 1)
        return first.expand_as(x)

    q = expand(q) if which in ("q", "all") else q
    k, v = (expand(k), expand(v)) if which in ("kv", "all") else (k, v)
    dout = expand(dout) if which in ("dout", "all") else dout
    options = {"causal": "bottom_right", "deterministic": True, "algorithm": algorithm}
    expected = forward_backward(*(x.contiguous() for x in (q, k, v, dout)), **options)
    assert_same_bits(forward_backward(q, k, v, dout, **options), expected, f"{which} expanded over {dims}")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_F34_sum_backward(device, dtype, algorithm):
    """`out.sum().backward()` hands over a single element expanded over all four dimensions."""
    q, k, v, _ = make_qkv_dout(shape_for(device), dtype, device)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = forward(*leaves, algorithm=algorithm, deterministic=True)
    (out.sum() + lse.sum()).backward()
    dlse = torch.ones_like(lse)
    ones = torch.ones_like(q)
    options = {"dlse": dlse, "algorithm": algorithm, "deterministic": True}
    expected = backward(ones, q, k, v, out.detach(), lse.detach(), **options)
    assert_same_bits([x.grad for x in leaves], expected, "out.sum().backward()")


@pytest.mark.parametrize("algorithm", BACKWARD_ALGORITHMS)
def test_dout_with_a_strided_last_dimension(device, algorithm):
    """Gradients come in any layout, unlike inputs."""
    q, k, v, dout = make_qkv_dout(shape_for(device), torch.bfloat16, device)
    odd = dout.transpose(2, 3).contiguous().transpose(2, 3)
    assert odd.stride(3) != 1
    options = {"algorithm": algorithm, "deterministic": True}
    expected = forward_backward(q, k, v, dout, **options)
    assert_same_bits(forward_backward(q, k, v, odd, **options), expected, "strided dout")


# Of lse and dlse, for which v3 asks no alignment: not a layout of `serves`.
@pytest.mark.parametrize("lse_layout", ["strided", "expanded"])
@pytest.mark.parametrize("algorithm", BACKWARD_ALGORITHMS)
def test_lse_and_dlse_layouts(device, algorithm, lse_layout):
    q, k, v, dout = make_qkv_dout(shape_for(device), torch.bfloat16, device)
    options = {"algorithm": algorithm, "deterministic": True}
    out, lse = forward(q, k, v, **options)
    if lse_layout == "strided":
        dlse = torch.randn_like(lse)
        odd = torch.stack([lse, lse], -1)[..., 0], torch.stack([dlse, dlse], -1)[..., 0]
    else:
        dlse = torch.full_like(lse, 0.5)
        odd = lse.clone(), dlse[:1, :1, :1].expand_as(lse)
    expected = backward(dout, q, k, v, out, lse, dlse=dlse, **options)
    actual = backward(dout, q, k, v, out, odd[0], dlse=odd[1], **options)
    assert_same_bits(actual, expected, f"{lse_layout} lse and dlse")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("ones", [(1, 1, 1, 1), (1, 2, 70, 90), (2, 1, 70, 90), (1, 1, 1, 90)], ids=str)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_F36_absurd_strides_on_dimensions_of_size_one(device, algorithm, dtype, ones):
    batch, heads, seqlen_q, seqlen_k = ones
    tensors = make_qkv_dout(Shape(batch, heads, heads, seqlen_q, seqlen_k, 64), dtype, device)
    options = {"deterministic": True, "algorithm": algorithm}
    expected = forward_backward(*tensors, **options)
    absurd = [with_absurd_strides(x) for x in tensors]
    assert any(99990001 in x.stride() for x in absurd)
    assert_same_bits(forward_backward(*absurd, **options), expected, "strides of size-1 dimensions")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_head_dim_one_with_a_strided_last_dimension(device, dtype):
    """A row of one element is dense whatever its stride says."""
    tensors = make_qkv_dout(shape_for(device, head_dim=1), dtype, device)
    odd = [torch.stack([x, torch.full_like(x, math.nan)], -1)[..., 0] for x in tensors]
    expected = forward_backward(*tensors, deterministic=True)
    assert_same_bits(forward_backward(*odd, deterministic=True), expected, "head_dim 1")


@pytest.mark.parametrize("layout", ["contiguous", "bshd", "sbhd"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_results_keep_the_order_of_dimensions(device, dtype, layout):
    """Each result is dense, with the dimensions in memory in the order of the input it belongs to."""
    tensors = [lay_out(x, layout) for x in make_qkv_dout(shape_for(device), dtype, device)]
    out, lse, dq, dk, dv = forward_backward(*tensors)
    for result, like in ((out, tensors[0]), (dq, tensors[0]), (dk, tensors[1]), (dv, tensors[2])):
        assert result.stride() == like.stride()
    assert lse.is_contiguous()


def test_three_dimensional_views(device):
    q, k, v, _ = make_qkv_dout(Shape(3, 1, 1, 70, 80, 40), torch.bfloat16, device)
    expected = flash_ext.flash_attention(q[:, 0], k[:, 0], v[:, 0], return_lse=True)
    placed = [lay_out(x, "longer_cache", math.nan)[:, 0] for x in (q, k, v)]
    assert_same_bits(flash_ext.flash_attention(*placed, return_lse=True), expected, "3-D views")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_F26_every_element_of_every_result_is_written(device, dtype, algorithm):
    """With NaN in all memory that torch hands out uninitialised, results and workspace alike."""
    tensors = make_qkv_dout(shape_for(device, seqlen_q=100, seqlen_k=50), dtype, device)
    options = {"causal": "bottom_right", "algorithm": algorithm, "deterministic": True}
    assert_nan_in_fresh_memory_does_not_show(tensors, **options)


@pytest.mark.parametrize("head_dim", [40, 59])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_F25_freed_memory_full_of_nan(device, algorithm, dtype, head_dim):
    """The allocator hands back poisoned blocks: what a kernel pads its tiles with must not be read."""
    tensors = make_qkv_dout(shape_for(device, head_dim=head_dim), dtype, device)
    options = {"causal": "bottom_right", "deterministic": True, "algorithm": algorithm}
    expected = forward_backward(*tensors, **options)
    for _ in range(3):
        poison = [torch.full((1 << 16,), math.nan, device=device) for _ in range(8)]
        del poison
        assert_same_bits(forward_backward(*tensors, **options), expected, "reused memory")
