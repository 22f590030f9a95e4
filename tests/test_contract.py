"""The contract on values: what comes out where attention is degenerate, extreme or empty."""

import math
import subprocess
import sys

import pytest
import torch
from calls import ALGORITHMS, BACKWARD_ALGORITHMS, CPU_ALGORITHMS, forward, forward_backward
from inputs import Shape, make_qkv, make_qkv_dout
from matrix import CAUSAL_MODES, DTYPES, HALF_DTYPES, dtype_name, length, tile_edge
from numerics import check_forward, check_gradients

import flash_ext

SIZES = ((1, 1), (4, 2))
LARGEST_KEY_TILE = 256  # of the CUDA kernels, see csrc/v2/config.cuh


def check(q, k, v, dout, *, dlse=None, algorithm="auto", deterministic=False, **options):
    out, lse, *gradients = forward_backward(
        q, k, v, dout, dlse=dlse, algorithm=algorithm, deterministic=deterministic, **options
    )
    check_forward(out, lse, q, k, v, **options)
    check_gradients(gradients, q, k, v, dout, dlse=dlse, **options)
    return out, lse, *gradients


# ---- rows and tensors with nothing in them -------------------------------------------------------


@pytest.mark.parametrize("visible", [1, 2, 17], ids=lambda n: f"{n}-rows-see-something")
@pytest.mark.parametrize("heads", SIZES, ids="h{0[0]}-{0[1]}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_F19_rows_without_keys(device, algorithm, dtype, heads, visible):
    """Bottom-right causal with more queries than keys: the first rows see nothing."""
    empty = length((2, 3), device)
    q, k, v, dout = make_qkv_dout(Shape(2, *heads, empty + visible, visible, 40), dtype, device)
    dlse = torch.randn(q.shape[:3], device=device)
    out, lse, dq, *_ = check(q, k, v, dout, dlse=dlse, causal="bottom_right", algorithm=algorithm)
    assert (out[:, :, :empty] == 0).all()
    assert (lse[:, :, :empty] == -math.inf).all()
    assert (dq[:, :, :empty] == 0).all()


@pytest.mark.parametrize("causal", CAUSAL_MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_F14_no_keys(device, algorithm, dtype, causal):
    q, k, v, dout = make_qkv_dout(Shape(2, 4, 2, length((2, 1), device), 0, 24), dtype, device)
    out, lse, dq, dk, dv = forward_backward(q, k, v, dout, causal=causal, algorithm=algorithm)
    assert (out == 0).all()
    assert (lse == -math.inf).all()
    assert (dq == 0).all()
    assert dk.shape == dv.shape == k.shape


@pytest.mark.parametrize("causal", CAUSAL_MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_F14_no_queries(device, algorithm, dtype, causal):
    q, k, v, dout = make_qkv_dout(Shape(2, 4, 2, 0, length((2, 1), device), 24), dtype, device)
    out, lse, dq, dk, dv = forward_backward(q, k, v, dout, causal=causal, algorithm=algorithm)
    assert out.shape == dq.shape == q.shape
    assert lse.shape == q.shape[:3]
    assert (dk == 0).all()
    assert (dv == 0).all()


@pytest.mark.parametrize(
    "shape", [Shape(0), Shape(heads=0, heads_kv=0), Shape(0, seqlen_k=0), Shape(seqlen_q=0, seqlen_k=0)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_F14_nothing_at_all(device, algorithm, dtype, shape):
    leaves = [x.requires_grad_() for x in make_qkv(shape, dtype, device)]
    out, lse = forward(*leaves, causal="bottom_right", algorithm=algorithm)
    assert out.shape == shape.q
    assert lse.shape == shape.q[:3]
    for x, gradient in zip(leaves, torch.autograd.grad(out.sum() + lse.sum(), leaves), strict=True):
        assert gradient.shape == x.shape
        assert (gradient == 0).all()


@pytest.mark.parametrize("causal", CAUSAL_MODES)
@pytest.mark.parametrize("seqlens", [(1, 1), (1, 100), (100, 1), (1, 64), (2, 129)], ids="q{0[0]}-k{0[1]}".format)
@pytest.mark.parametrize("head_dim", [33, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_one_query_or_one_key(device, algorithm, dtype, head_dim, seqlens, causal):
    check(*make_qkv_dout(Shape(2, 4, 1, *seqlens, head_dim), dtype, device), causal=causal, algorithm=algorithm)


# ---- extreme logits ------------------------------------------------------------------------------


def constant_logits(shape, dtype, device, logit):
    """Every score is exactly `logit` (a number that dtype holds) at scale 1; keys and values are random."""
    q, k, v, dout = make_qkv_dout(shape, dtype, device)
    q.zero_()[..., 0] = 1
    k[..., 0] = logit
    return q, k, v, dout


@pytest.mark.parametrize("level", [-300.0, -100.0, -88.0, 88.0, 100.0, 300.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("algorithm", BACKWARD_ALGORITHMS)
def test_F12_padded_keys_in_the_backward(device, algorithm, dtype, level):
    """A key past the end scored 0 instead of -inf is exp(0 - lse) = inf once lse < -88, at every length."""
    edge = tile_edge(device)
    for seqlen in range(edge + 1, 2 * edge, 1 if device == "cpu" else 7):
        q, k, v, dout = constant_logits(Shape(1, 2, 1, seqlen, seqlen, 16), dtype, device, level)
        q, k, v, dout = q.contiguous(), k.contiguous(), v, dout
        check(q, k, v, dout, scale=1.0, causal="bottom_right", algorithm=algorithm)


@pytest.mark.parametrize("causal", CAUSAL_MODES)
@pytest.mark.parametrize("level", [-300.0, -100.0, 0.0, 100.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("algorithm", BACKWARD_ALGORITHMS)
def test_F12_one_query(device, algorithm, dtype, level, causal):
    for seqlen_k in (1, 3, tile_edge(device) + 3):
        tensors = constant_logits(Shape(1, 2, 1, 1, seqlen_k, 16), dtype, device, level)
        check(*tensors, scale=1.0, causal=causal, algorithm=algorithm)


@pytest.mark.parametrize("level", [-1e5, -5e4 - 1000, 1e5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=dtype_name)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_F11_no_finite_stand_in_for_minus_infinity(device, algorithm, dtype, level):
    """All logits of a row far below any sentinel, also behind a causal mask."""
    seqlen = length((2, 5), device)
    for causal in CAUSAL_MODES:
        q, k, v, dout = constant_logits(Shape(1, 2, 2, seqlen, seqlen + 7, 16), dtype, device, level)
        check(q, k, v, dout, scale=1.0, causal=causal, algorithm=algorithm)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_F10_negative_scores_after_a_masked_tile(device, algorithm, dtype):
    """A row maximum of 0 left by a tile without visible keys would beat them all."""
    q, k, v, dout = make_qkv_dout(Shape(1, 7, 1, length((5, 8), device), length((4, 0), device), 64), dtype, device)
    q, k = q.abs() + 1, -k.abs() - 1
    check(q, k, v, dout, scale=1.0, causal="bottom_right", algorithm=algorithm)


@pytest.mark.parametrize("sign", [1, -1], ids=["positive", "negative"])
@pytest.mark.parametrize("scale", [None, 1.0, -1.0])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_F29_huge_inputs_bf16(device, algorithm, scale, sign):
    """bf16 inputs of 133,120: finite results, and where all scores are alike the mean of v."""
    shape = Shape(1, 1, 1, length((2, 1), device), length((3, 1), device), 64)
    q, k, v, dout = make_qkv_dout(shape, torch.bfloat16, device)
    q.fill_(133120.0)
    k.fill_(sign * 133120.0)
    out, lse, *gradients = forward_backward(q, k, v, dout, scale=scale, algorithm=algorithm)
    check_forward(out, lse, q, k, v, scale=scale)
    assert all(x.isfinite().all() for x in gradients)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_F29_huge_inputs_fp16(device, algorithm):
    """fp16: 256 x 256 x 80 = 5.2 million, far over fp16's 65,504, before the scale."""
    q, k, v, dout = make_qkv_dout(Shape(1, 2, 2, 70, 80, 80), torch.float16, device)
    q.fill_(256.0)
    k.fill_(256.0)
    out, lse, *gradients = forward_backward(q, k, v, dout, algorithm=algorithm)
    check_forward(out, lse, q, k, v)
    assert all(x.isfinite().all() for x in gradients)


@pytest.mark.parametrize("scale", [0.0, -1.0, -1e4, 1e4, 1e30, -1e30])
@pytest.mark.parametrize("causal", CAUSAL_MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_F30_any_finite_scale(device, algorithm, dtype, causal, scale):
    """Scores of +-k up to 3e31: the softmax is one-hot and all is finite."""
    q, k, v, _ = make_qkv_dout(Shape(1, 2, 2, 40, 50, 16), dtype, device, "small_ints")
    v.normal_()
    out, lse = forward(q, k, v, scale=scale, causal=causal, algorithm=algorithm)
    check_forward(out, lse, q, k, v, scale=scale, causal=causal)


@pytest.mark.parametrize("scale", [0.0, -1.0, 1e4, -1e4])
@pytest.mark.parametrize("causal", CAUSAL_MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("algorithm", BACKWARD_ALGORITHMS)
def test_F30_gradients_at_any_finite_scale(device, algorithm, dtype, causal, scale):
    q, k, v, dout = make_qkv_dout(Shape(1, 2, 2, 40, 50, 16), dtype, device, "small_ints")
    check(q, k, v, dout / 64, scale=scale, causal=causal, algorithm=algorithm)


# ---- extreme values ------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", CAUSAL_MODES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    ("dtype", "largest"), [(torch.float16, 65504.0), (torch.bfloat16, 1e36), (torch.float32, 1e36)], ids=str
)
def test_huge_values(device, dtype, largest, algorithm, causal):
    """Values at fp16's limit; in the others so large that only a product with a weight may be taken."""
    q, k, v = make_qkv(Shape(1, 2, 2, 70, 90, 32), dtype, device)
    v = torch.sign(v) * largest
    out, lse = forward(q, k, v, causal=causal, algorithm=algorithm)
    check_forward(out, lse, q, k, v, causal=causal)


@pytest.mark.parametrize("tensor", ["q", "k", "v", "dout"])
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=dtype_name)
@pytest.mark.parametrize("algorithm", BACKWARD_ALGORITHMS)
def test_denormals(device, algorithm, dtype, tensor):
    """Inputs below the smallest normal number are not flushed to zero."""
    inputs = dict(zip(("q", "k", "v", "dout"), make_qkv_dout(Shape(1, 2, 2, 40, 50, 32), dtype, device)))
    smallest = torch.finfo(dtype).smallest_normal
    inputs[tensor] = inputs[tensor].sign() * (smallest / 2)
    # In bf16 the products would leave fp32's range too: make up for it with the scale.
    scale = (0.05 / smallest if tensor in "qk" else None) if dtype == torch.float16 else None
    # Additions to global memory, the default way to sum dQ on a GPU, flush what is subnormal in fp32.
    check(*inputs.values(), scale=scale, algorithm=algorithm, deterministic=device == "cuda")


@pytest.mark.parametrize("tensor", ["q", "k", "v"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_numbers_stay_in_their_head(device, tensor, value):
    """NaN and infinite inputs show in their own (batch, head) and nowhere else."""
    inputs = dict(zip("qkv", make_qkv(Shape(2, 2, 2, 40, 50, 32), torch.bfloat16, device)))
    clean, _ = forward(*inputs.values())
    inputs[tensor] = inputs[tensor].clone()
    inputs[tensor][1, 0] = value
    out, _ = forward(*inputs.values())
    assert not out[1, 0].isfinite().all()
    out[1, 0] = clean[1, 0]
    assert torch.equal(out, clean)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_hidden_keys_do_not_leak(device, algorithm):
    """NaN in the keys that a causal mask hides from every tile of the first rows."""
    seqlen = length((12, 0), device)
    q, k, v = make_qkv(Shape(1, 2, 2, seqlen, seqlen, 32), torch.bfloat16, device)
    clean = forward(q, k, v, causal="bottom_right", algorithm=algorithm)
    half = seqlen // 2
    k[:, :, half:], v[:, :, half:] = math.nan, math.nan
    out, lse = forward(q, k, v, causal="bottom_right", algorithm=algorithm)
    first = half - max(tile_edge(device), LARGEST_KEY_TILE if device == "cuda" else 0)
    assert torch.equal(out[:, :, :first], clean[0][:, :, :first])
    assert torch.equal(lse[:, :, :first], clean[1][:, :, :first])


MEASURE_PEAK = """
import resource, torch, flash_ext
torch.set_num_threads(1)
x = torch.randn(1, 1, {seqlen}, 8, requires_grad=True)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
flash_ext.flash_attention(x, x, x, causal=True, algorithm="{algorithm}").sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("algorithm", CPU_ALGORITHMS)
def test_memory_is_linear_on_the_cpu(algorithm):
    """Forward and backward at 8192 tokens: a matrix of scores would take 256 MiB."""
    script = MEASURE_PEAK.format(seqlen=8192, algorithm=algorithm)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 < 32 * 2**20


def test_error_message_is_not_the_end(device):
    """After an exception the next call works."""
    q, k, v, dout = make_qkv_dout(Shape(), torch.bfloat16, device)
    with pytest.raises(RuntimeError):
        flash_ext.flash_attention(q, k, v, scale=math.nan)
    check(q, k, v, dout)
