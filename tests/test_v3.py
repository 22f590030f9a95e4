"""What is particular to v3: what it refuses, what "auto" then takes, and its own tiles and schedule."""

import pytest
import torch
from calls import assert_same_bits, forward, missing_for
from inputs import ALIGNED_LAYOUTS, FAMILIES, LAYOUTS, Shape, lay_out, make_qkv
from matrix import CAUSAL_MODES, DTYPES, HALF_DTYPES, dtype_name
from numerics import check_forward

import flash_ext

BF16 = torch.bfloat16
MISALIGNED_LAYOUTS = [name for name in LAYOUTS if name not in ALIGNED_LAYOUTS]
HEAD_DIMS = (64, 96, 128, 192, 256)  # of the kernels
# Around the 64 query rows of a warpgroup and two or three of them, and blocks of 64, 96 and 128 keys.
SEQLENS_Q = (1, 64, 65, 127, 192, 193, 385)
SEQLENS_K = (1, 95, 96, 97, 128, 129, 257, 385)

v3 = pytest.mark.parametrize("algorithm", ["v3"])


def refuse(rule, *tensors):
    """v3 raises with this message, wherever it is asked for."""
    for call in (forward, flash_ext.flash_attention, flash_ext.explain):
        with pytest.raises(RuntimeError, match=rf"flash_ext\.forward: algorithm 'v3' {rule}"):
            call(*tensors, algorithm="v3")


def assert_auto_is_v2(reason, *tensors):
    explanation = flash_ext.explain(*tensors)
    assert explanation.algorithm == "v2"
    assert f"v3 {reason}" in explanation.reasons
    assert_same_bits(forward(*tensors), forward(*tensors, algorithm="v2"), "algorithm='auto'")


# ---- which calls ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=dtype_name)
def test_the_cpu_has_no_v3(dtype):
    tensors = make_qkv(Shape(), dtype, "cpu")
    refuse(r"needs a GPU of compute capability 9\.0, got the CPU", *tensors)
    assert_auto_is_v2("needs a GPU of compute capability 9.0, got the CPU", *tensors)


@pytest.mark.gpus(1)
def test_other_gpus_and_builds_have_no_v3():
    if not missing_for("v3"):
        pytest.skip("needs a GPU or a build without v3")
    tensors = make_qkv(Shape(), BF16, "cuda")
    refuse(r"(needs a GPU of compute capability 9\.0, got \d+\.\d|is not part of this build)", *tensors)
    assert flash_ext.explain(*tensors).algorithm == "v2"


@pytest.mark.hopper
def test_fp32_is_refused():
    tensors = make_qkv(Shape(), torch.float32, "cuda")
    refuse("needs float16 or bfloat16, got float32", *tensors)
    assert_auto_is_v2("needs float16 or bfloat16, got float32", *tensors)


@pytest.mark.hopper
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("layout", MISALIGNED_LAYOUTS)
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=dtype_name)
def test_misaligned_rows_are_refused(dtype, layout, name):
    tensors = dict(zip("qkv", make_qkv(Shape(2, 4, 2, 70, 90, 64), dtype, "cuda"), strict=True))
    tensors[name] = lay_out(tensors[name], layout)
    rule = f"needs rows that begin at multiples of 16 bytes, got {name} with others"
    refuse(rule, *tensors.values())
    assert_auto_is_v2(rule, *tensors.values())
    check_forward(*forward(*tensors.values()), *tensors.values())


@pytest.mark.hopper
@pytest.mark.parametrize("head_dim", [1, 60, 255])
def test_other_head_dims_are_refused(head_dim):
    """Also where gaps behind the rows of the inputs make them begin at multiples of 16 bytes."""
    tensors = [x[..., :head_dim] for x in make_qkv(Shape(2, 4, 2, 70, 90, 256), BF16, "cuda")]
    rule = f"needs a head_dim that is a multiple of 8, got {head_dim}"
    refuse(rule, *tensors)
    assert_auto_is_v2(rule, *tensors)


@v3
@pytest.mark.parametrize("layout", ALIGNED_LAYOUTS)
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=dtype_name)
def test_auto_takes_v3(device, algorithm, dtype, layout):
    tensors = [lay_out(x, layout) for x in make_qkv(Shape(2, 4, 2, 70, 90, 40), dtype, device)]
    explanation = flash_ext.explain(*tensors)
    assert explanation.algorithm == "v3"
    assert explanation.workspace_bytes == 0
    assert_same_bits(forward(*tensors), forward(*tensors, algorithm=algorithm), "algorithm='auto'")


@pytest.mark.hopper
@pytest.mark.parametrize("batch", [1, 64])
def test_auto_takes_v2_for_one_short_head(batch):
    """Whatever the batch: a row's bits must not depend on it."""
    short, long, wide = (
        make_qkv(Shape(batch, 1, 1, seqlen, 300, head_dim), BF16, "cuda")
        for seqlen, head_dim in ((1024, 64), (1025, 64), (1024, 72))
    )
    assert flash_ext.explain(*short).algorithm == "v2"
    assert "v3 is slower" in str(flash_ext.explain(*short))
    assert_same_bits(forward(*short), forward(*short, algorithm="v2"), "algorithm='auto'")
    many_keys = make_qkv(Shape(batch, 1, 1, 1, 2048, 64), BF16, "cuda")
    for tensors in (long, wide, many_keys):
        assert flash_ext.explain(*tensors).algorithm == "v3"


@v3
def test_v3_is_not_v2(device, algorithm):
    """Blocks of other sizes: sums come in another order, which shows in fp32."""
    tensors = make_qkv(Shape(2, 4, 2, 133, 547, 128), BF16, device)
    assert not torch.equal(forward(*tensors, algorithm=algorithm)[1], forward(*tensors, algorithm="v2")[1])


# ---- its tiles -----------------------------------------------------------------------------------


@v3
@pytest.mark.parametrize("causal", ["none", "bottom_right"])
@pytest.mark.parametrize("head_dim", range(8, 257, 8))
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=dtype_name)
def test_every_head_dim(device, algorithm, dtype, head_dim, causal):
    """What TMA fills up with zeros, and leaves out of the result."""
    q, k, v = make_qkv(Shape(2, 2, 1, 200, 300, head_dim), dtype, device)
    check_forward(*forward(q, k, v, causal=causal, algorithm=algorithm), q, k, v, causal=causal)


@v3
@pytest.mark.parametrize("causal", CAUSAL_MODES)
@pytest.mark.parametrize("seqlen_q", SEQLENS_Q)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_lengths_around_its_tiles(device, algorithm, head_dim, seqlen_q, causal):
    for seqlen_k in SEQLENS_K:
        q, k, v = make_qkv(Shape(1, 2, 1, seqlen_q, seqlen_k, head_dim), BF16, device)
        check_forward(*forward(q, k, v, causal=causal, algorithm=algorithm), q, k, v, causal=causal)


@v3
@pytest.mark.parametrize("scale", [None, -0.125, 0.0])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS[1:])
def test_data(device, algorithm, head_dim, family, scale):
    """test_forward's families on the other kernels: maxima that move, and Q with its sign changed."""
    q, k, v = make_qkv(Shape(2, 2, 1, 199, 257, head_dim), BF16, device, family)
    options = {"causal": "bottom_right", "scale": scale}
    check_forward(*forward(q, k, v, algorithm=algorithm, **options), q, k, v, **options)


@v3
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=dtype_name)
def test_data_of_many_blocks(device, algorithm, dtype, head_dim, family, sign):
    """Weights that are tried by the maximum so far, and stand in no block, in some, and in all."""
    q, k, v = make_qkv(Shape(1, 2, 1, 199, 1500, head_dim), dtype, device, family)
    for causal in ("none", "bottom_right"):
        options = {"causal": causal, "scale": sign * head_dim**-0.5}
        check_forward(*forward(q, k, v, algorithm=algorithm, **options), q, k, v, **options)


# ---- short kernel --------------------------------------------------------------------------------

# Of head_dim 64: at most 1024 keys, enough heads, and fewer rows left over by tiles of 256 than by 192.
SHORT_SEQLENS_Q = (193, 256, 450, 512, 961, 1024)
SHORT_SEQLENS_K = (1, 63, 64, 65, 127, 129, 449, 1024)


@v3
@pytest.mark.parametrize("causal", CAUSAL_MODES)
@pytest.mark.parametrize("seqlen_q", SHORT_SEQLENS_Q)
def test_short_kernel(device, algorithm, seqlen_q, causal):
    for seqlen_k in SHORT_SEQLENS_K:
        q, k, v = make_qkv(Shape(1, 24, 8, seqlen_q, seqlen_k, 64), BF16, device)
        assert flash_ext.explain(q, k, v, algorithm=algorithm).block_m == 256
        check_forward(*forward(q, k, v, causal=causal, algorithm=algorithm), q, k, v, causal=causal)


@v3
@pytest.mark.parametrize("scale", [None, -0.125, 0.0])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=dtype_name)
def test_short_kernel_data(device, algorithm, dtype, family, scale):
    q, k, v = make_qkv(Shape(1, 24, 8, 199, 257, 40), dtype, device, family)
    options = {"causal": "bottom_right", "scale": scale}
    check_forward(*forward(q, k, v, algorithm=algorithm, **options), q, k, v, **options)


@v3
@pytest.mark.parametrize("batch", [1, 32])
def test_which_calls_are_short(device, algorithm, batch):
    """Whatever the batch: a row's bits must not depend on it."""
    for heads, seqlen_q, seqlen_k, block_m in (
        (12, 512, 1024, 256),
        (11, 512, 1024, 192),
        (12, 513, 1024, 192),
        (12, 512, 1025, 192),
    ):
        q, k, v = make_qkv(Shape(batch, heads, heads, seqlen_q, seqlen_k, 64), BF16, device)
        assert flash_ext.explain(q, k, v, algorithm=algorithm).block_m == block_m


# ---- its schedule --------------------------------------------------------------------------------


@v3
@pytest.mark.parametrize("causal", CAUSAL_MODES)
@pytest.mark.parametrize("scale", [None, -0.1])
@pytest.mark.parametrize(("head_dim", "seqlen_q"), [(64, 550), *((head_dim, 450) for head_dim in HEAD_DIMS)])
def test_many_tiles_for_each_thread_block(device, algorithm, head_dim, seqlen_q, scale, causal):
    """Buffers and barriers go round many times: each sequence as when it has the GPU to itself."""
    q, k, v = make_qkv(Shape(40, 12, 4, seqlen_q, 500, head_dim), BF16, device)
    options = {"causal": causal, "scale": scale, "algorithm": algorithm}
    out, lse = forward(q, k, v, **options)
    for i in (0, 17, 39):
        one = slice(i, i + 1)
        alone = forward(q[one], k[one], v[one], **options)
        assert_same_bits((out[one], lse[one]), alone, f"batch entry {i}")
    check_forward(*alone, q[one], k[one], v[one], causal=causal, scale=scale)


@v3
@pytest.mark.parametrize("causal", ["none", "bottom_right"])
@pytest.mark.parametrize(("head_dim", "seqlen_k"), [(64, 1100), *((head_dim, 900) for head_dim in HEAD_DIMS)])
def test_repeats_on_a_full_gpu(device, algorithm, head_dim, seqlen_k, causal):
    q, k, v = make_qkv(Shape(8, 16, 4, 1000, seqlen_k, head_dim), BF16, device)
    first = forward(q, k, v, causal=causal, algorithm=algorithm)
    for i in range(50):
        assert_same_bits(forward(q, k, v, causal=causal, algorithm=algorithm), first, f"repetition {i}")
