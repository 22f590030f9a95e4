"""Gradients where few key heads serve many query heads: on a GPU v2's backward cuts a group into parts and adds
up their dK and dV (csrc/backward/parts.h). On the CPU the same calls must keep the same promises."""

import math

import pytest
import torch
from calls import (
    assert_nan_in_fresh_memory_does_not_show,
    assert_same_bits,
    assert_subset_of_gradients,
    backward,
    extra_memory,
    forward,
    forward_backward,
)
from inputs import LAYOUTS, Shape, lay_out, make_qkv_dout
from matrix import (
    CAUSAL_MODES,
    DTYPES,
    HALF_DTYPES,
    NEEDS,
    dtype_name,
    edge_name,
    heads_name,
    length,
    needs_name,
)
from numerics import check_gradients

BF16 = torch.bfloat16
V2 = {"algorithm": "v2"}
HEADS = ((32, 1), (8, 1), (12, 3), (7, 1))
MIN_QUERIES = 512  # of a part
KEYS_PER_MULTIPROCESSOR = {64: 192, 128: 128, 256: 64}

deterministic_or_not = pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])


def num_parts(shape, padded_head_dim):
    """As csrc/backward/parts.h has it, on the current GPU."""
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    group = shape.heads // shape.heads_kv
    wanted_keys = 3 * multiprocessors * KEYS_PER_MULTIPROCESSOR[padded_head_dim] // 2
    wanted = math.ceil(wanted_keys / (shape.heads_kv * shape.seqlen_k))
    parts = max(1, min(wanted, group * shape.seqlen_q // MIN_QUERIES, group))
    return parts if parts == 1 else next(n for n in range(parts, group + 1) if group % n == 0)


def long_enough(device):
    """Query rows that are worth a part for each head of a group."""
    return length((8, 5), device)


def check(shape, dtype, device, *, deterministic=False, with_dlse=False, **options):
    q, k, v, dout = make_qkv_dout(shape, dtype, device)
    dlse = torch.randn(shape.q[:3], device=device) if with_dlse else None
    options["dlse"] = dlse
    _, _, *gradients = forward_backward(q, k, v, dout, deterministic=deterministic, **V2, **options)
    check_gradients(gradients, q, k, v, dout, **options)


# ---- right -------------------------------------------------------------------------------------------


@deterministic_or_not
@pytest.mark.parametrize("causal", CAUSAL_MODES)
@pytest.mark.parametrize("k_edge", [(0, 1), (1, -1), (1, 0), (2, 1), (5, 3)], ids=edge_name)
@pytest.mark.parametrize("q_edge", [(1, 1), (4, 0), (8, 1)], ids=edge_name)
@pytest.mark.parametrize("heads", HEADS, ids=heads_name)
def test_lengths_around_tile_edges(device, heads, q_edge, k_edge, causal, deterministic):
    shape = Shape(1, *heads, length(q_edge, device), length(k_edge, device), 32)
    check(shape, BF16, device, causal=causal, deterministic=deterministic)


@deterministic_or_not
@pytest.mark.parametrize("head_dim", [1, 40, 64, 80, 111, 128, 136, 255, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_head_dim(device, dtype, head_dim, deterministic):
    shape = Shape(2, 8, 2, long_enough(device), length((3, 3), device), head_dim)
    check(shape, dtype, device, causal="bottom_right", deterministic=deterministic, with_dlse=True)


@pytest.mark.gpus(1)
@pytest.mark.parametrize("causal", ["none", "bottom_right"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_several_heads_a_part(head_dim, causal):
    """So many keys that fewer parts than heads fill the GPU."""
    shape = Shape(1, 32, 1, 300, 4101 * 64 // head_dim, head_dim)
    assert 1 < num_parts(shape, head_dim) < 32
    check(shape, BF16, "cuda", causal=causal)


def test_keys_that_no_query_sees(device):
    """Parts of keys beyond the mask are zeros, and so are their sums."""
    shape = Shape(1, 8, 1, long_enough(device), 2 * long_enough(device), 64)
    q, k, v, dout = make_qkv_dout(shape, BF16, device)
    _, _, _, dk, dv = forward_backward(q, k, v, dout, causal="top_left", **V2)
    assert (dk[:, :, shape.seqlen_q :] == 0).all()
    assert (dv[:, :, shape.seqlen_q :] == 0).all()


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=dtype_name)
def test_every_part_counts_once(device, dtype):
    """The weight of a single key is 1, and dV the exact sum of small integers over all queries of the group."""
    shape = Shape(2, 12, 3, long_enough(device), 1, 64)
    q, k, v, dout = make_qkv_dout(shape, dtype, device, "small_ints")
    dout = torch.randint_like(dout, -1, 2)
    dv = forward_backward(q, k, v, dout, **V2)[4]
    exact = dout.double().unflatten(1, (3, 4)).sum((2, 3))[:, :, None]
    assert_same_bits([dv], [exact.to(dtype)], "dv of one key")


# ---- what is asked for and where it lies -------------------------------------------------------------


@pytest.mark.parametrize("needs", NEEDS, ids=needs_name)
@pytest.mark.parametrize("heads", [(8, 1), (12, 3)], ids=heads_name)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_subsets_of_gradients(device, dtype, heads, needs):
    """F48: each gradient is the same whatever else is asked for."""
    q, k, v, dout = make_qkv_dout(
        Shape(2, *heads, long_enough(device), length((1, 5), device), 40), dtype, device
    )
    assert_subset_of_gradients(q, k, v, dout, needs, causal="bottom_right", deterministic=True, **V2)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
@pytest.mark.parametrize("head_dim", [40, 64, 111])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_layouts(device, dtype, head_dim, layout):
    """Dense, strided and unaligned rows; dK and dV are laid out as K and V are."""
    shape = Shape(2, 8, 2, long_enough(device), length((2, 7), device), head_dim)
    tensors = make_qkv_dout(shape, dtype, device)
    options = {"causal": "bottom_right", "deterministic": True, **V2}
    expected = forward_backward(*tensors, **options)
    placed = [lay_out(x, layout, math.nan) for x in tensors]
    assert_same_bits(forward_backward(*placed, **options), expected, f"layout {layout}")


@pytest.mark.parametrize("head_dim", [40, 59])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_every_element_is_written(device, dtype, head_dim):
    """With NaN in all memory that torch hands out uninitialised, results and workspace alike."""
    shape = Shape(2, 8, 1, long_enough(device), length((1, 7), device), head_dim)
    tensors = make_qkv_dout(shape, dtype, device)
    options = {"causal": "bottom_right", "deterministic": True, **V2}
    assert_nan_in_fresh_memory_does_not_show(tensors, **options)


# ---- the same bits -----------------------------------------------------------------------------------


@deterministic_or_not
@pytest.mark.parametrize("causal", CAUSAL_MODES)
@pytest.mark.parametrize("heads", HEADS, ids=heads_name)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_F57_repeats(device, dtype, heads, causal, deterministic):
    """dK and dV always; dQ when asked to."""
    shape = Shape(2, *heads, long_enough(device), length((2, 9), device), 64)
    q, k, v, dout = make_qkv_dout(shape, dtype, device)
    options = {"causal": causal, "deterministic": deterministic, **V2}
    out, lse = forward(q, k, v, **options)
    compared = slice(0 if deterministic else 1, None)
    first = backward(dout, q, k, v, out, lse, **options)[compared]
    for i in range(5):
        again = backward(dout, q, k, v, out, lse, **options)[compared]
        assert_same_bits(again, first, f"repetition {i}")


@pytest.mark.parametrize("causal", ["none", "bottom_right"])
@pytest.mark.parametrize("heads", HEADS, ids=heads_name)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_F59_batch_mates_do_not_matter(device, dtype, heads, causal):
    """A batch entry alone, among others, and in another place; enough of them to fill a GPU without any parts."""
    shape = Shape(5, *heads, long_enough(device), length((3, 5), device), 64)
    tensors = make_qkv_dout(shape, dtype, device)
    options = {"causal": causal, "deterministic": True, **V2}
    together = forward_backward(*tensors, **options)
    for i in (0, 3):
        one = slice(i, i + 1)
        alone = forward_backward(*(x[one] for x in tensors), **options)
        assert_same_bits(alone, [x[one] for x in together], f"batch entry {i} alone")
    order = torch.tensor([3, 0, 4, 4, 2, 1, 0] * (8 if device == "cuda" else 1), device=device)
    moved = forward_backward(*(x[order] for x in tensors), **options)
    assert_same_bits(moved, [x[order] for x in together], "batch entries reordered")


# ---- memory ------------------------------------------------------------------------------------------


@pytest.mark.gpus(1)
@deterministic_or_not
@pytest.mark.parametrize("needs", [(True, True, True), (False, True, False)], ids=needs_name)
@pytest.mark.parametrize("heads", [(32, 1), (8, 2), (2, 2)], ids=heads_name)
def test_F58_scratch_is_what_readme_says(heads, needs, deterministic):
    """To the float; this also shows that groups are cut into parts at all."""
    shape = Shape(2, *heads, 1000, 700, 100)
    q, k, v, dout = make_qkv_dout(shape, BF16, "cuda")
    out, lse = forward(q, k, v, **V2)
    parts = num_parts(shape, 128)
    assert (parts > 1) == (heads[0] > heads[1])
    wanted = [x for x, need in zip((q, k, v), needs, strict=True) if need]
    rows, rows_kv = shape.batch * shape.heads * 1024, shape.batch * shape.heads_kv
    floats = 3 * rows + rows_kv * 128
    if needs[0] and not deterministic:
        floats += rows * 128
    if parts > 1:
        floats += parts * rows_kv * 700 * 128 * sum(needs[1:])
    expected = 4 * floats + sum(x.numel() for x in wanted) * q.element_size()
    options = {"deterministic": deterministic, "needs": needs, **V2}
    assert extra_memory(lambda: backward(dout, q, k, v, out, lse, **options)) == expected
