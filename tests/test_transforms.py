"""What torch does with operators: opcheck, compile, export, autocast, vmap, FLOP counts, threads."""

import threading

import pytest
import torch
from calls import ALGORITHMS, BACKWARD_ALGORITHMS, assert_same_bits, backward, default_tile, forward, forward_backward
from inputs import LAYOUTS, Shape, lay_out, make_qkv, make_qkv_dout
from matrix import CAUSAL_MODES, DTYPES, HALF_DTYPES, dtype_name
from numerics import check_gradients
from torch.utils.flop_counter import FlopCounterMode

import flash_ext

SHAPE = Shape(2, 4, 2, 20, 37, 16)
LAYOUT_NAMES = tuple(LAYOUTS)


# ---- opcheck: schema, autograd registration, fake tensors, AOT dispatch --------------------------


@pytest.mark.parametrize("wanted", [(), (0,), (1, 2), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "bshd", "longer_cache"])
@pytest.mark.parametrize("causal", ["none", "bottom_right"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_opcheck_forward(device, algorithm, dtype, causal, layout, wanted):
    inputs = [lay_out(x, layout) for x in make_qkv(SHAPE, dtype, device)]
    for i in wanted:
        inputs[i].requires_grad_()
    options = (0.3, causal, algorithm, True, default_tile(inputs[0]))
    torch.library.opcheck(torch.ops.flash_ext.forward.default, (*inputs, *options))


@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, False, True)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "bshd", "longer_cache"])
@pytest.mark.parametrize("with_dlse", [False, True], ids=["", "dlse"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("algorithm", BACKWARD_ALGORITHMS)
def test_opcheck_backward(device, algorithm, dtype, with_dlse, layout, needs):
    q, k, v, dout = (lay_out(x, layout) for x in make_qkv_dout(SHAPE, dtype, device))
    out, lse = forward(q, k, v, causal="bottom_right")
    dlse = torch.randn_like(lse) if with_dlse else None
    options = (None, "bottom_right", algorithm, True, list(needs), default_tile(q))
    torch.library.opcheck(torch.ops.flash_ext.backward.default, (dout, q, k, v, out, lse, dlse, *options))


# ---- Meta ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
@pytest.mark.parametrize("shape", [SHAPE, Shape(1, 1, 1, 1, 1, 1), Shape(0), Shape(seqlen_k=0)], ids=str)
def test_F51_meta_results_have_the_real_strides(device, shape, layout):
    if 0 in (shape.batch, shape.seqlen_k) and layout.startswith("offset"):
        layout = "contiguous"
    tensors = [lay_out(x, layout) for x in make_qkv_dout(shape, torch.bfloat16, device)]
    real = forward_backward(*tensors)
    meta = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") for x in tensors]
    for a, b in zip(real, forward_backward(*meta), strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def test_F51_meta_takes_sizes_that_no_memory_holds():
    """Host code is 64-bit: 2^40 elements and more."""
    q = torch.empty(1 << 10, 1 << 10, 1 << 20, 128, dtype=torch.bfloat16, device="meta")
    out, lse = forward(q, q, q, causal="bottom_right")
    assert out.shape == q.shape
    assert lse.shape == q.shape[:3]
    assert [x.shape for x in backward(out, q, q, q, out, lse)] == [q.shape] * 3


# ---- torch.compile and torch.export --------------------------------------------------------------


@pytest.fixture
def fresh_compiler():
    """Dynamo refuses to compile one function more than a few times."""
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=dtype_name)
@pytest.mark.parametrize("layout", ["contiguous", "bshd"])
def test_compile_forward(device, layout, dtype):
    q, k, v = (lay_out(x, layout) for x in make_qkv(SHAPE, dtype, device))
    function = torch.compile(flash_ext.flash_attention, fullgraph=True, backend="aot_eager")
    actual = function(q, k, v, causal=True, return_lse=True)
    assert_same_bits(actual, flash_ext.flash_attention(q, k, v, causal=True, return_lse=True), "compiled")


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("layout", ["contiguous", "bshd"])
def test_compile_backward(device, layout):
    q, k, v, dout = (lay_out(x, layout) for x in make_qkv_dout(SHAPE, torch.float32, device))
    compiled = torch.compile(lambda *x: flash_ext.flash_attention(*x, causal=True), fullgraph=True, backend="aot_eager")
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    compiled(*leaves).backward(dout)
    check_gradients([x.grad for x in leaves], q, k, v, dout, causal="bottom_right")


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=dtype_name)
def test_compile_dynamic_shapes_once(device, dtype):
    """Batch, heads and both lengths change; one graph serves all."""
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    function = torch.compile(flash_ext.flash_attention, fullgraph=True, dynamic=True, backend=count)
    # Sizes that are equal in the first call would be taken for one size.
    for shape in (Shape(5, 6, 3, 20, 37, 16), Shape(3, 6, 3, 33, 45, 16), Shape(4, 8, 2, 129, 65, 16)):
        q, k, v = make_qkv(shape, dtype, device)
        actual = function(q, k, v, causal=True, return_lse=True)
        assert_same_bits(actual, flash_ext.flash_attention(q, k, v, causal=True, return_lse=True), str(shape))
    assert len(graphs) == 1


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_with_inductor(device, dynamic):
    """The default backend, which writes and compiles code around the operator."""
    q, k, v, dout = make_qkv_dout(SHAPE, torch.float32, device)

    def function(q, k, v):
        out, lse = flash_ext.flash_attention(q.sin(), k, v, causal=True, return_lse=True)
        return out * 2 + lse.unsqueeze(-1)

    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic)(*leaves)
    eager_leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    eager = function(*eager_leaves)
    torch.testing.assert_close(compiled, eager)
    compiled.backward(dout)
    eager.backward(dout)
    for a, b in zip(leaves, eager_leaves, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


class Attention(torch.nn.Module):
    def forward(self, q, k, v):
        return flash_ext.flash_attention(q, k, v, causal=True)


def test_export(device):
    inputs = make_qkv(SHAPE, torch.bfloat16, device)
    batch, length = torch.export.Dim("batch", min=2), torch.export.Dim("length", min=2, max=1 << 20)
    shapes = {0: batch, 2: length}
    program = torch.export.export(Attention(), inputs, dynamic_shapes=(shapes, {0: batch}, {0: batch}))
    assert "flash_ext.forward" in str(program.graph)
    other = make_qkv(SHAPE.with_(batch=3, seqlen_q=29), torch.bfloat16, device)
    assert_same_bits([program.module()(*other)], [Attention()(*other)], "exported")


# ---- autocast, vmap, FLOPs -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=dtype_name)
def test_F50_autocast(device, dtype):
    """Mixed inputs are cast as scaled_dot_product_attention casts them, and gradients come back."""
    q, k, v = make_qkv(SHAPE, torch.float32, device)
    mixed = [q.requires_grad_(), k.requires_grad_(), v.to(dtype).requires_grad_()]
    expected = [x.detach().to(dtype).requires_grad_() for x in mixed]
    with torch.autocast(device, dtype=dtype):
        out, lse = flash_ext.flash_attention(*mixed, return_lse=True, deterministic=True)
        sdpa = torch.nn.functional.scaled_dot_product_attention(*mixed, enable_gqa=True)
    assert out.dtype == sdpa.dtype == dtype
    direct = flash_ext.flash_attention(*expected, return_lse=True, deterministic=True)
    assert_same_bits((out, lse), direct, "autocast")
    dout = torch.randn_like(out)
    out.backward(dout)
    direct[0].backward(dout)
    for a, b in zip(mixed, expected, strict=True):
        assert a.grad.dtype == a.dtype
        assert torch.equal(a.grad.to(dtype), b.grad)


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (1, 0, 2), (0, None, None), (None, 0, 0)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=dtype_name)
def test_vmap(device, dtype, causal, in_dims):
    q, k, v = make_qkv(SHAPE, dtype, device)

    def stacked(x, dim):
        return x if dim is None else torch.stack([x, 2 * x, x - 1], dim)

    mapped = [stacked(x, dim) for x, dim in zip((q, k, v), in_dims, strict=True)]
    function = torch.func.vmap(lambda *x: flash_ext.flash_attention(*x, causal=causal), in_dims=in_dims)
    actual = function(*mapped)
    for i in range(3):
        single = [x if dim is None else x.select(dim, i) for x, dim in zip(mapped, in_dims, strict=True)]
        torch.testing.assert_close(actual[i], flash_ext.flash_attention(*single, causal=causal))


@pytest.mark.parametrize("causal", CAUSAL_MODES)
def test_flop_counter(device, causal):
    """As torch counts its own attention: every score, 2 products forward and 5 backward."""
    leaves = [x.requires_grad_() for x in make_qkv(SHAPE, torch.float32, device)]
    with FlopCounterMode(display=False) as counter:
        out, _ = forward(*leaves, causal=causal)
        forward_flops = counter.get_total_flops()
        out.sum().backward()
    assert forward_flops == 4 * 2 * 4 * 20 * 37 * 16
    assert counter.get_total_flops() - forward_flops == 10 * 2 * 4 * 20 * 37 * 16


def test_flop_counter_counts_general_attention(device):
    """Masks hide nothing from it, and packed sequences are counted one by one."""
    leaves = [x.requires_grad_() for x in make_qkv(SHAPE, torch.float32, device)]
    with FlopCounterMode(display=False) as counter:
        flash_ext.flash_attention(*leaves, window=(3, 0), softcap=2.0).sum().backward()
    assert counter.get_total_flops() == (4 + 10) * 2 * 4 * 20 * 37 * 16
    q, k, v = (torch.randn(20, heads, 16, device=device) for heads in (4, 2, 2))
    offsets = torch.tensor([0, 5, 12], device=device, dtype=torch.int32)
    lengths = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets, "max_seqlen_q": 7, "max_seqlen_k": 7}
    with FlopCounterMode(display=False) as counter:
        flash_ext.flash_attention(q, k, v, **lengths)
    assert counter.get_total_flops() == 4 * 4 * (5 * 5 + 7 * 7) * 16


# ---- callers in many threads ---------------------------------------------------------------------


def test_threads_may_call_at_once(device):
    """Eight threads, each with its own inputs, through autograd."""
    cases = [make_qkv_dout(SHAPE.with_(seqlen_q=20 + i), torch.bfloat16, device) for i in range(8)]
    results = [None] * len(cases)

    def work(i):
        leaves = [x.clone().requires_grad_() for x in cases[i][:3]]
        out = flash_ext.flash_attention(*leaves, causal=True, deterministic=True)
        out.backward(cases[i][3])
        results[i] = (out, *(x.grad for x in leaves))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(cases))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for i, case in enumerate(cases):
        leaves = [x.clone().requires_grad_() for x in case[:3]]
        out = flash_ext.flash_attention(*leaves, causal=True, deterministic=True)
        out.backward(case[3])
        for actual, expected in zip(results[i], (out, *(x.grad for x in leaves)), strict=True):
            assert torch.equal(actual, expected)
