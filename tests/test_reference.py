"""The reference itself, against torch's own math and against three nested loops."""

import math

import pytest
import torch
from inputs import Shape, make_qkv

import flash_ext.reference
from flash_ext import attention_reference

ZERO_SHAPES = (Shape(0), Shape(seqlen_q=0), Shape(seqlen_k=0), Shape(heads=0, heads_kv=0))
CAUSAL_ARGUMENTS = (False, True, "bottom_right", "top_left")


def triple_loop(q, k, v, causal, scale):
    """One score at a time, in Python floats, straight from the definition."""
    batch, heads, seqlen_q = q.shape[:3]
    heads_kv, seqlen_k = k.shape[1:3]
    out, lse = torch.zeros_like(q), torch.full(q.shape[:3], -math.inf, dtype=q.dtype)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, (batch, heads, seqlen_q))).tolist():
        kv_head = h // (heads // heads_kv)
        weights = []
        for j in range(seqlen_k):
            hidden = {False: False, "top_left": j > i}.get(causal, j > i + seqlen_k - seqlen_q)
            dot = sum(x * y for x, y in zip(q[b, h, i].tolist(), k[b, kv_head, j].tolist(), strict=True))
            weights.append(0.0 if hidden else math.exp(scale * dot))
        if total := sum(weights):
            lse[b, h, i] = math.log(total)
            for j, weight in enumerate(weights):
                out[b, h, i] += weight / total * v[b, kv_head, j]
    return out, lse


@pytest.mark.parametrize("causal", CAUSAL_ARGUMENTS)
@pytest.mark.parametrize("seqlens", [(5, 5), (3, 7), (7, 3), (1, 4)], ids="q{0[0]}-k{0[1]}".format)
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)], ids="h{0[0]}-{0[1]}".format)
def test_triple_loop(causal, seqlens, heads):
    shape = Shape(2, *heads, *seqlens, head_dim=6)
    q, k, v = make_qkv(shape, torch.float64, "cpu")
    out, lse = attention_reference(q, k, v, causal=causal, scale=0.7)
    loop_out, loop_lse = triple_loop(q, k, v, causal, 0.7)
    torch.testing.assert_close(out, loop_out, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(lse, loop_lse, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("causal", [False, "top_left"])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("seqlens", [(33, 33), (20, 50), (50, 20)], ids="q{0[0]}-k{0[1]}".format)
@pytest.mark.parametrize("scale", [None, 0.3, -1.5])
def test_sdpa_math(device, causal, group, seqlens, scale):
    shape = Shape(2, 4, 4 // group, *seqlens, head_dim=24)
    inputs = [x.requires_grad_() for x in make_qkv(shape, torch.float64, device)]
    out, _ = attention_reference(*inputs, causal=causal, scale=scale)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        sdpa = torch.nn.functional.scaled_dot_product_attention(
            *inputs, is_causal=causal == "top_left", scale=scale, enable_gqa=True
        )
    torch.testing.assert_close(out, sdpa, rtol=1e-12, atol=1e-13)
    dout = torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad(out, inputs, dout), torch.autograd.grad(sdpa, inputs, dout), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("causal", CAUSAL_ARGUMENTS)
def test_chunks_change_nothing(device, causal, monkeypatch):
    """Values and gradients do not depend on how the query rows are cut."""
    shape = Shape(2, 4, 2, 23, 19, 8)
    inputs = [x.requires_grad_() for x in make_qkv(shape, torch.float64, device)]

    def results():
        out, lse = attention_reference(*inputs, causal=causal)
        objective = out.square().sum() + lse.masked_fill(lse == -math.inf, 0).sin().sum()
        return out, lse, *torch.autograd.grad(objective, inputs)

    whole = results()
    monkeypatch.setattr(flash_ext.reference, "_MAX_SCORES", 8 * 19 * 5)
    for ours, expected in zip(results(), whole, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-13, atol=1e-14)


def test_memory_is_linear(monkeypatch):
    """What autograd keeps between forward and backward is less than one matrix of scores."""
    saved = []

    def keep(tensor):
        saved.append(tensor.numel())
        return tensor

    inputs = [x.requires_grad_() for x in make_qkv(Shape(1, 1, 1, 512, 512, 2), torch.float64, "cpu")]
    monkeypatch.setattr(flash_ext.reference, "_MAX_SCORES", 512 * 16)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        attention_reference(*inputs, causal=True)
    assert 0 < sum(saved) < 512 * 512 / 2


@pytest.mark.parametrize("causal", CAUSAL_ARGUMENTS)
def test_rows_without_keys(device, causal):
    """Out 0, lse -inf, gradients 0; where rows do have keys all is finite."""
    inputs = [x.requires_grad_() for x in make_qkv(Shape(1, 2, 1, 6, 2, 4), torch.float64, device)]
    out, lse = attention_reference(*inputs, causal=causal)
    empty = 4 if causal in (True, "bottom_right") else 0
    assert (out[:, :, :empty] == 0).all()
    assert (lse[:, :, :empty] == -math.inf).all()
    assert lse[:, :, empty:].isfinite().all()
    gradients = torch.autograd.grad(out.sum() + lse[:, :, empty:].sum(), inputs)
    assert all(x.isfinite().all() for x in gradients)
    assert (gradients[0][:, :, :empty] == 0).all()


@pytest.mark.parametrize("shape", ZERO_SHAPES, ids=str)
@pytest.mark.parametrize("causal", CAUSAL_ARGUMENTS)
def test_zero_sizes(device, shape, causal):
    inputs = [x.requires_grad_() for x in make_qkv(shape, torch.float64, device)]
    out, lse = attention_reference(*inputs, causal=causal)
    assert out.shape == shape.q
    assert lse.shape == shape.q[:3]
    assert (out == 0).all()
    assert (lse == -math.inf).all()
    for gradient, x in zip(torch.autograd.grad(out.sum(), inputs), inputs, strict=True):
        assert gradient.shape == x.shape
        assert (gradient == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("input_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_result_dtype(device, dtype, input_dtype):
    out, lse = attention_reference(*make_qkv(Shape(), input_dtype, device), dtype=dtype)
    assert out.dtype == lse.dtype == dtype


def test_three_dimensions_are_one_head(device):
    q, k, v = make_qkv(Shape(3, 1, 1, 9, 11, 8), torch.float32, device)
    out, lse = attention_reference(q, k, v, causal=True)
    out3, lse3 = attention_reference(q[:, 0], k[:, 0], v[:, 0], causal=True)
    assert torch.equal(out3, out[:, 0])
    assert torch.equal(lse3, lse[:, 0])


def test_unknown_arguments():
    q, k, v = make_qkv(Shape(), torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"causal must be .* got 'upper'"):
        attention_reference(q, k, v, causal="upper")
    with pytest.raises(ValueError, match=r"dtype must be .* got torch\.float16"):
        attention_reference(q, k, v, dtype=torch.float16)
