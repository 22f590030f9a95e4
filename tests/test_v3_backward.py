"""What is particular to v3's backward: what it refuses, what "auto" then takes, and its own tiles and schedule."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from calls import assert_same_bits, backward, forward, forward_backward, missing_for
from inputs import ALIGNED_LAYOUTS, FAMILIES, LAYOUTS, Shape, lay_out, make_qkv_dout
from matrix import CAUSAL_MODES, DTYPES, HALF_DTYPES, dtype_name
from numerics import check_gradients, reference_gradients, relative_error

import flash_ext

BF16 = torch.bfloat16
MISALIGNED_LAYOUTS = [name for name in LAYOUTS if name not in ALIGNED_LAYOUTS]
HEAD_DIMS = (64, 128, 256)  # of the kernels
# Around blocks of 64 and 128 query rows, and of 128 keys.
SEQLENS_Q = (1, 63, 64, 65, 127, 129, 193, 300)
SEQLENS_K = (1, 64, 65, 127, 128, 129, 257, 385)
CPU_REFUSAL = r"needs a GPU of compute capability 9\.0, got the CPU"

v3 = pytest.mark.parametrize("algorithm", ["v3"])


def saved(shape, dtype=BF16, device="cuda", algorithm="auto"):
    """The tensors that the operator takes, by name."""
    q, k, v, dout = make_qkv_dout(shape, dtype, device)
    out, lse = forward(q, k, v, algorithm=algorithm)
    return {"dout": dout, "q": q, "k": k, "v": v, "out": out, "lse": lse}


def refuse(rule, tensors):
    with pytest.raises(RuntimeError, match=rf"flash_ext\.backward: algorithm 'v3' {rule}"):
        backward(**tensors, algorithm="v3")


def assert_auto_is_v2(tensors):
    automatic = backward(**tensors, deterministic=True)
    assert_same_bits(automatic, backward(**tensors, algorithm="v2", deterministic=True), "algorithm='auto'")


# ---- which calls ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=dtype_name)
def test_the_cpu_has_no_v3(dtype):
    tensors = saved(Shape(), dtype, "cpu")
    refuse(CPU_REFUSAL, tensors)
    assert_auto_is_v2(tensors)


def test_the_algorithm_is_checked(device):
    with pytest.raises(RuntimeError, match=r"flash_ext\.backward: algorithm must be .*got 'v4'"):
        backward(**saved(Shape(), device=device), algorithm="v4")
    on_meta = {name: x.to("meta") for name, x in saved(Shape(), device=device).items()}
    with pytest.raises(RuntimeError, match=r"flash_ext\.backward: algorithm must be .*got 'v4'"):
        backward(**on_meta, algorithm="v4")


def test_nothing_to_compute_asks_for_no_gpu():
    """Empty gradients and gradients of nothing launch nothing, as v3's forward does not."""
    assert all((x == 0).all() for x in backward(**saved(Shape(seqlen_k=0), device="cpu"), algorithm="v3"))


def test_explain_names_the_backward(device):
    q, k, v, _ = make_qkv_dout(Shape(), BF16, device)
    expected = "v3" if device == "cuda" and missing_for("v3") is None else "v2"
    assert flash_ext.explain(q, k, v).backward == expected
    assert flash_ext.explain(q, k, v, algorithm="v2").backward == "v2"
    assert flash_ext.explain(q, k, v, algorithm="v1").backward == "v2"
    assert f"{expected} backward" in str(flash_ext.explain(q, k, v))


@pytest.mark.gpus(1)
def test_other_gpus_and_builds_have_no_v3():
    if not missing_for("v3"):
        pytest.skip("needs a GPU or a build without v3")
    tensors = saved(Shape())
    refuse(r"(needs a GPU of compute capability 9\.0, got \d+\.\d|is not part of this build)", tensors)
    assert_auto_is_v2(tensors)


@pytest.mark.hopper
def test_fp32_is_refused():
    tensors = saved(Shape(), torch.float32)
    refuse("needs float16 or bfloat16, got float32", tensors)
    assert_auto_is_v2(tensors)


@pytest.mark.hopper
@pytest.mark.parametrize("name", ["q", "k", "v", "out"])
@pytest.mark.parametrize("misaligned", MISALIGNED_LAYOUTS)
def test_misaligned_rows_are_refused(misaligned, name):
    tensors = saved(Shape(2, 4, 2, 70, 90, 64))
    tensors[name] = lay_out(tensors[name], misaligned)
    refuse(f"needs rows that begin at multiples of 16 bytes, got {name} with others", tensors)
    assert_auto_is_v2(tensors)


@pytest.mark.hopper
@pytest.mark.parametrize("head_dim", [1, 60, 255])
def test_other_head_dims_are_refused(head_dim):
    tensors = saved(Shape(2, 4, 2, 70, 90, head_dim))
    refuse(f"needs a head_dim that is a multiple of 8, got {head_dim}", tensors)
    assert_auto_is_v2(tensors)


@v3
@pytest.mark.parametrize("misaligned", [*MISALIGNED_LAYOUTS, "strided"])
def test_dout_comes_in_any_layout(device, algorithm, misaligned):
    """It is not the caller's choice: what TMA cannot read is copied."""
    tensors = saved(Shape(2, 4, 2, 70, 90, 64), device=device)
    dout = tensors["dout"]
    odd = dout.mT.contiguous().mT if misaligned == "strided" else lay_out(dout, misaligned, torch.nan)
    for asked in (algorithm, "auto"):
        options = {"algorithm": asked, "deterministic": True}
        expected = backward(**tensors, **options)
        assert_same_bits(backward(**(tensors | {"dout": odd}), **options), expected, f"dout {misaligned}")


@v3
@pytest.mark.parametrize("asked", ["auto", "v1", "v2", "v3"])
def test_autograd_takes_the_algorithm_of_the_forward(device, algorithm, asked):
    tensors = saved(Shape(2, 4, 2, 300, 400, 64), device=device, algorithm=asked)
    leaves = [tensors[name].clone().requires_grad_() for name in "qkv"]
    out, _ = forward(*leaves, algorithm=asked, deterministic=True)
    gradients = torch.autograd.grad(out, leaves, tensors["dout"])
    v2, ours = (backward(**tensors, algorithm=name, deterministic=True) for name in ("v2", algorithm))
    assert not torch.equal(v2[0], ours[0])
    assert_same_bits(gradients, v2 if asked in ("v1", "v2") else ours, f"gradients of {asked}")


# ---- its tiles -----------------------------------------------------------------------------------


def check(q, k, v, dout, *, dlse=None, algorithm="v3", deterministic=False, **options):
    gradients = forward_backward(
        *(q, k, v, dout), dlse=dlse, algorithm=algorithm, deterministic=deterministic, **options
    )[2:]
    check_gradients(gradients, q, k, v, dout, dlse=dlse, **options)


@v3
@pytest.mark.parametrize("causal", ["none", "bottom_right"])
@pytest.mark.parametrize("head_dim", range(8, 257, 8))
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=dtype_name)
def test_every_head_dim(device, algorithm, dtype, head_dim, causal):
    """What TMA fills up with zeros, and leaves out of the results."""
    tensors = make_qkv_dout(Shape(2, 2, 1, 200, 300, head_dim), dtype, device)
    check(*tensors, causal=causal, algorithm=algorithm)


@v3
@pytest.mark.parametrize("causal", CAUSAL_MODES)
@pytest.mark.parametrize("seqlen_q", SEQLENS_Q)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_lengths_around_its_tiles(device, algorithm, head_dim, seqlen_q, causal):
    for seqlen_k in SEQLENS_K:
        tensors = make_qkv_dout(Shape(1, 2, 1, seqlen_q, seqlen_k, head_dim), BF16, device)
        check(*tensors, causal=causal, algorithm=algorithm, deterministic=seqlen_k % 2 == 0)


@v3
@pytest.mark.parametrize("scale", [None, -0.125, 0.0])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_data(device, algorithm, head_dim, family, scale):
    tensors = make_qkv_dout(Shape(2, 2, 1, 199, 257, head_dim), BF16, device, family)
    dlse = torch.randn(2, 2, 199, device=device)
    check(*tensors, dlse=dlse, causal="bottom_right", scale=scale, algorithm=algorithm)


@v3
@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize("family", ["rand01", "key_channel_-30"])
@pytest.mark.parametrize("seqlen", [512, 4096])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_biased_keys_in_long_sequences(device, algorithm, head_dim, seqlen, family, deterministic):
    """The longer the sequence, the smaller dQ beside the error that the mean of the keys would make."""
    q, k, v, dout = make_qkv_dout(Shape(1, 1, 1, seqlen, seqlen, head_dim), BF16, device, family)
    dq = forward_backward(q, k, v, dout, algorithm=algorithm, deterministic=deterministic)[2]
    assert relative_error(dq, reference_gradients(q, k, v, dout)[2]) <= 2e-2


# ---- its schedule --------------------------------------------------------------------------------


@v3
@pytest.mark.parametrize("causal", CAUSAL_MODES)
@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_many_tiles_for_each_thread_block(device, algorithm, head_dim, deterministic, causal):
    """Buffers and barriers go round many times: each sequence as when it has the GPU to itself."""
    q, k, v, dout = make_qkv_dout(Shape(40, 12, 4, 450, 500, head_dim), BF16, device)
    options = {"causal": causal, "algorithm": algorithm, "deterministic": deterministic}
    gradients = forward_backward(q, k, v, dout, **options)[2:]
    for i in (0, 17, 39):
        one = [x[i : i + 1] for x in (q, k, v, dout)]
        alone = forward_backward(*one, **options)[2:]
        for name, together, expected in zip(("dq", "dk", "dv"), gradients, alone, strict=True):
            if name != "dq" or deterministic:
                assert_same_bits([together[i : i + 1]], [expected], f"{name} of batch entry {i}")
        check_gradients([x[i : i + 1] for x in gradients], *one, causal=causal)


@v3
@pytest.mark.parametrize("causal", ["none", "bottom_right"])
@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_repeats_on_a_full_gpu(device, algorithm, head_dim, deterministic, causal):
    """1,000 times the same bits: of dK and dV always, of dQ where asked for."""
    q, k, v, dout = make_qkv_dout(Shape(4, 16, 4, 500, 450, head_dim), BF16, device)
    out, lse = forward(q, k, v, causal=causal, algorithm=algorithm)
    options = {"causal": causal, "algorithm": algorithm, "deterministic": deterministic}
    first = backward(dout, q, k, v, out, lse, **options)
    compared = slice(0 if deterministic else 1, None)
    different = torch.zeros((), dtype=torch.int64, device=device)
    for _ in range(1000):
        again = backward(dout, q, k, v, out, lse, **options)
        for a, b in zip(again[compared], first[compared], strict=True):
            different += (a.view(torch.int16) != b.view(torch.int16)).any()
    assert different.item() == 0


@v3
@pytest.mark.parametrize("call", ["forward", "backward"])
def test_a_thread_whose_first_call_to_cuda_is_ours(device, algorithm, call):
    """Tensor maps come from the driver, which makes no context current as the runtime does."""
    tensors = saved(Shape(), device=device)
    run = {
        "forward": lambda: forward(*(tensors[name] for name in "qkv"), algorithm=algorithm),
        "backward": lambda: backward(**tensors, algorithm=algorithm, needs=(False, True, True)),
    }[call]
    expected = run()
    with ThreadPoolExecutor(1) as thread:
        assert_same_bits(thread.submit(run).result(), expected, "another thread")


@v3
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_keys_that_no_query_sees(device, algorithm, head_dim):
    """Whole tiles of them between others: thread blocks that have had work, have none, and then have again."""
    shape = Shape(4, 48, 48, 200, 1400, head_dim)
    q, k, v, dout = make_qkv_dout(shape, BF16, device)
    for _ in range(5):
        *_, dk, dv = forward_backward(q, k, v, dout, causal="top_left", algorithm=algorithm)
        assert not dk[:, :, 200:].any()
        assert not dv[:, :, 200:].any()
