"""What only a GPU has: streams, graphs, several devices, device memory and very large tensors."""

import math

import pytest
import torch
from calls import (
    ALGORITHMS,
    BACKWARD_ALGORITHMS,
    assert_same_bits,
    backward,
    extra_memory,
    forward,
    forward_backward,
)
from inputs import Shape, make_qkv, make_qkv_dout
from matrix import DTYPES, dtype_name
from numerics import check_forward, check_gradients, reference_gradients, relative_error

import flash_ext
from flash_ext import attention_reference

pytestmark = pytest.mark.gpus(1)

BF16 = torch.bfloat16
SHAPE = Shape(2, 4, 2, 200, 300, 64)
OPTIONS = {"causal": "bottom_right", "deterministic": True}


def busy(seconds=0.5):
    """Keep the current stream busy for about so long."""
    torch.cuda._sleep(int(seconds * 1.5e9))


# ---- streams -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_F43_the_current_stream(algorithm, dtype):
    """Inputs written late on a side stream are read on that stream, after the write."""
    good = make_qkv_dout(SHAPE, dtype, "cuda")
    expected = forward_backward(*good, algorithm=algorithm, **OPTIONS)
    tensors = [torch.zeros_like(x) for x in good]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        busy()
        for x, value in zip(tensors, good, strict=True):
            x.copy_(value)
        actual = forward_backward(*tensors, algorithm=algorithm, **OPTIONS)
        for x in tensors:
            x.zero_()
    side.synchronize()
    assert_same_bits(actual, expected, "a side stream")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_no_hidden_synchronisation(algorithm):
    """Forward and backward return while the GPU has not begun with them."""
    tensors = make_qkv_dout(SHAPE, BF16, "cuda")
    forward_backward(*tensors, algorithm=algorithm, causal="bottom_right")
    torch.cuda.synchronize()
    finished = torch.cuda.Event()
    busy()
    forward_backward(*tensors, algorithm=algorithm, causal="bottom_right")
    finished.record()
    assert not finished.query()
    torch.cuda.synchronize()


def test_two_streams_at_once():
    cases = [make_qkv_dout(SHAPE.with_(seqlen_q=n), BF16, "cuda") for n in (200, 333)]
    expected = [forward_backward(*x, **OPTIONS) for x in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    results = [[], []]
    for _ in range(50):
        for case, stream, found in zip(cases, streams, results, strict=True):
            with torch.cuda.stream(stream):
                found.append(forward_backward(*case, **OPTIONS))
    torch.cuda.synchronize()
    for found, right in zip(results, expected, strict=True):
        for actual in found:
            assert_same_bits(actual, right, "two streams at once")


# ---- CUDA graphs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_F45_graph_replay(algorithm, dtype, deterministic):
    """Captured once, replayed with other contents: accumulators must be cleared in the graph itself."""
    options = {"causal": "bottom_right", "deterministic": deterministic, "algorithm": algorithm}
    tensors = make_qkv_dout(SHAPE, dtype, "cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        forward_backward(*tensors, **options)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward_backward(*tensors, **options)
    for _ in range(5):
        for x in tensors:
            x.normal_()
        for _ in range(20):
            graph.replay()
        q, k, v, dout = tensors
        if deterministic:
            assert_same_bits(captured, forward_backward(*tensors, **options), "a replayed graph")
        check_forward(*captured[:2], q, k, v, causal="bottom_right")
        check_gradients(captured[2:], q, k, v, dout, causal="bottom_right")


def test_F45_graph_of_autograd():
    q, k, v, dout = make_qkv_dout(SHAPE, BF16, "cuda")
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    attention = torch.cuda.make_graphed_callables(
        lambda *x: flash_ext.flash_attention(*x, causal=True, deterministic=True), tuple(leaves)
    )
    attention(*leaves).backward(dout)
    expected = forward_backward(q, k, v, dout, **OPTIONS)[2:]
    for leaf, gradient in zip(leaves, expected, strict=True):
        assert torch.equal(leaf.grad, gradient)


# ---- several devices -----------------------------------------------------------------------------


@pytest.mark.gpus(2)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_F41_a_device_that_is_not_current(algorithm, dtype):
    tensors = make_qkv_dout(SHAPE, dtype, "cuda:0")
    expected = forward_backward(*tensors, algorithm=algorithm, **OPTIONS)
    elsewhere = [x.to("cuda:1") for x in tensors]
    actual = forward_backward(*elsewhere, algorithm=algorithm, **OPTIONS)
    assert torch.cuda.current_device() == 0
    assert all(x.device == torch.device("cuda:1") for x in actual)
    assert_same_bits([x.to("cuda:0") for x in actual], expected, "cuda:1")
    assert flash_ext.explain(*elsewhere[:3]).num_thread_blocks > 0


@pytest.mark.gpus(2)
@pytest.mark.parametrize("name", ["dout", "q", "k", "v", "out", "lse", "dlse"])
def test_F42_tensors_on_two_gpus(name):
    q, k, v, dout = make_qkv_dout(SHAPE, BF16, "cuda:0")
    out, lse = forward(q, k, v)
    arguments = {"dout": dout, "q": q, "k": k, "v": v, "out": out, "lse": lse, "dlse": lse.clone()}
    arguments[name] = arguments[name].to("cuda:1")
    with pytest.raises(RuntimeError, match=r"flash_ext\.backward: \w+ must be on cuda:[01].*got cuda:[01]"):
        torch.ops.flash_ext.backward(**arguments)
    if name in "qkv":
        with pytest.raises(RuntimeError, match=r"flash_ext\.forward: \w must be on cuda:[01].*got cuda:[01]"):
            forward(arguments["q"], arguments["k"], arguments["v"])


# ---- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seqlen", [512, 1024, 16384])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_forward_takes_what_explain_says(algorithm, seqlen):
    q, k, v = make_qkv(Shape(2, 4, 4, seqlen, seqlen, 64), BF16, "cuda")
    workspace = flash_ext.explain(q, k, v, algorithm=algorithm).workspace_bytes
    results = q.numel() * 2 + q.numel() // 64 * 4
    assert extra_memory(lambda: forward(q, k, v, algorithm=algorithm)) <= results + workspace


@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("algorithm", BACKWARD_ALGORITHMS)
def test_F58_backward_memory_is_linear(algorithm, dtype, deterministic):
    """Four times the length takes four times the memory, and nothing like a matrix of scores."""

    def measure(seqlen):
        q, k, v, dout = make_qkv_dout(Shape(1, 2, 2, seqlen, seqlen, 64), dtype, "cuda")
        out, lse = forward(q, k, v, algorithm=algorithm)
        options = {"algorithm": algorithm, "deterministic": deterministic}
        return extra_memory(lambda: backward(dout, q, k, v, out, lse, **options))

    short, long = measure(8192), measure(32768)
    assert long <= 4.1 * short
    # dq, dk, dv; dq in fp32; three floats of statistics a row.
    assert long <= 2 * 32768 * (64 * (3 * 4 + 4) + 3 * 4) * 1.05


def test_memory_does_not_grow():
    tensors = make_qkv_dout(SHAPE, BF16, "cuda")
    forward_backward(*tensors, causal="bottom_right")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(1000):
        forward_backward(*tensors, causal="bottom_right")
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_F46_out_of_memory_is_an_exception(algorithm):
    """A result of 2^40 elements; the process and the device live on."""
    q = torch.zeros(1, 1, 1, 64, dtype=BF16, device="cuda").expand(1 << 12, 1 << 10, 1 << 12, 64)
    with pytest.raises(torch.OutOfMemoryError):
        forward(q, q, q, algorithm=algorithm)
    tensors = make_qkv_dout(SHAPE, BF16, "cuda")
    check_forward(*forward(*tensors[:3], algorithm=algorithm), *tensors[:3])


@pytest.mark.gpu_memory(20)
def test_F46_a_grid_too_large_names_the_shape():
    """2^31 thread blocks: one more than a grid may have."""
    q = torch.zeros(1, 1, 1, 1, dtype=BF16, device="cuda").expand(1 << 21, 1 << 10, 1, 1)
    with pytest.raises(RuntimeError, match=r"2147483648 .*2147483647.*batch=2097152 heads_q=1024"):
        forward(q, q, q, algorithm="v2")
    small = make_qkv(SHAPE, BF16, "cuda")
    check_forward(*forward(*small), *small)


# ---- more than 2^31 elements ---------------------------------------------------------------------

BEYOND = 1 << 31


def check_sampled_rows(q, k, v, out, dout, dq, rows, causal):
    """Rows are independent: each sampled query against the keys it sees, in fp64."""
    for row in rows:
        keys = slice(None) if causal == "none" else slice(0, row + 1 + k.shape[2] - q.shape[2])
        one = [q[:, :, row : row + 1], k[:, :, keys], v[:, :, keys], dout[:, :, row : row + 1]]
        exact = reference_gradients(*one)
        assert relative_error(out[:, :, row : row + 1], exact[0]) <= 5e-3, f"out at row {row}"
        assert relative_error(dq[:, :, row : row + 1], exact[2]) <= 2e-2, f"dq at row {row}"


@pytest.mark.gpu_memory(60)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_F01_queries_beyond_2_31_elements(algorithm):
    """q, out, dout, dq and the accumulator of dq; few keys."""
    seqlen_q = BEYOND // 64 + 1000
    q, k, v, dout = make_qkv_dout(Shape(1, 1, 1, seqlen_q, 100, 64), BF16, "cuda")
    out, lse, dq, dk, dv = forward_backward(q, k, v, dout, algorithm=algorithm)
    rows = (0, 1, BEYOND // 128 - 1, BEYOND // 128, seqlen_q - 1001, seqlen_q - 1000, seqlen_q - 1)
    check_sampled_rows(q, k, v, out, dout, dq, rows, "none")
    assert dk.isfinite().all()
    assert dv.isfinite().all()
    assert lse.isfinite().all()


@pytest.mark.gpu_memory(60)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_F01_keys_beyond_2_31_elements(algorithm):
    """k, v, dk and dv; few queries. Keys past the middle repeat those before it: their gradients too."""
    half = BEYOND // 128 + 256
    q, k, v, dout = make_qkv_dout(Shape(1, 1, 1, 3, half, 64), BF16, "cuda")
    k, v = k.repeat(1, 1, 2, 1), v.repeat(1, 1, 2, 1)
    out, lse, dq, dk, dv = forward_backward(q, k, v, dout, algorithm=algorithm, deterministic=True)
    exact, exact_lse = attention_reference(q, k[:, :, :half], v[:, :, :half])
    # Tensor cores round sums towards zero. H200, after 33.5 million keys: v2 9.1e-3, v3 3.4e-2.
    assert relative_error(out, exact) <= 5e-2
    assert relative_error(lse, exact_lse + math.log(2)) <= 1e-5
    assert dq.isfinite().all()
    for gradient in (dk, dv):
        assert torch.equal(gradient[:, :, :half], gradient[:, :, half:])


@pytest.mark.gpu_memory(60)
def test_F01_lse_beyond_2_31_elements():
    """v2 alone: the accumulator that v1 keeps in memory would be 66 floats for each of 2^31 rows."""
    one = make_qkv(Shape(1, 1, 1, 1 << 16, 2, 1), BF16, "cuda")
    expected = [x[0] for x in forward(*one, algorithm="v2")]
    batch = BEYOND // (1 << 16) + 3
    out, lse = forward(*(x.expand(batch, -1, -1, -1) for x in one), algorithm="v2")
    for i in (0, 1, batch // 2, batch - 4, batch - 3, batch - 2, batch - 1):
        assert_same_bits([out[i], lse[i]], expected, f"batch entry {i}")


@pytest.mark.gpu_memory(30)
@pytest.mark.parametrize("algorithm", BACKWARD_ALGORITHMS)
def test_F04_large_batch_with_accumulated_dq(algorithm):
    """As test_repeatability's, but not deterministic: dQ is summed in device memory."""
    one = make_qkv_dout(Shape(1, 2, 1, 3, 2, 8), BF16, "cuda")
    q, k, v, dout = (x.expand(70001, -1, -1, -1) for x in one)
    gradients = forward_backward(q, k, v, dout, causal="bottom_right", algorithm=algorithm)[2:]
    exact = reference_gradients(*one, causal="bottom_right")[2:]
    for name, actual, expected in zip(("dq", "dk", "dv"), gradients, exact, strict=True):
        error = (actual.double() - expected).abs().amax(0)
        assert (error <= 2e-2 * expected.abs().max()).all(), name


@pytest.mark.gpu_memory(20)
@pytest.mark.parametrize("algorithm", BACKWARD_ALGORITHMS)
def test_a_million_tokens(algorithm):
    """Causal, sampled: rows of out and dq, and of dk and dv by their columns of the score matrix."""
    seqlen = 1 << 20
    q, k, v, dout = make_qkv_dout(Shape(1, 1, 1, seqlen, seqlen, 64), BF16, "cuda")
    out, lse, dq, dk, dv = forward_backward(q, k, v, dout, causal="bottom_right", algorithm=algorithm)
    assert torch.equal(out[0, 0, 0], v[0, 0, 0])
    rows = (63, 64, 12345, 524287, 524288, seqlen - 65, seqlen - 1)
    check_sampled_rows(q, k, v, out, dout, dq, rows, "bottom_right")

    q64, dout64, scale = q[0, 0].double(), dout[0, 0].double(), 64**-0.5
    delta = (dout64 * out[0, 0].double()).sum(-1)
    for key in rows:
        p = torch.exp(scale * q64[key:] @ k[0, 0, key].double() - lse[0, 0, key:].double())
        ds = p * (dout64[key:] @ v[0, 0, key].double() - delta[key:])
        assert relative_error(dv[0, 0, key], p @ dout64[key:]) <= 2e-2, f"dv at key {key}"
        assert relative_error(dk[0, 0, key], scale * ds @ q64[key:]) <= 2e-2, f"dk at key {key}"
