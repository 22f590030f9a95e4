"""The same bits every time, and for every row whatever runs beside it."""

import pytest
import torch
from calls import ALGORITHMS, BACKWARD_ALGORITHMS, assert_same_bits, backward, forward, forward_backward
from inputs import Shape, make_qkv_dout
from matrix import CAUSAL_MODES, DTYPES, HALF_DTYPES, dtype_name, length

REPETITIONS = 10
MANY_HEADS = Shape(4, 6, 2, 150, 170, 64)


@pytest.fixture(autouse=True)
def several_threads():
    """Threads that disturb each other would show here."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def select(tensors, index):
    return [x[index] for x in tensors]


@pytest.mark.parametrize("causal", CAUSAL_MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_F55_forward_repeats(device, algorithm, dtype, causal):
    q, k, v, _ = make_qkv_dout(MANY_HEADS, dtype, device)
    first = forward(q, k, v, causal=causal, algorithm=algorithm)
    for i in range(REPETITIONS):
        assert_same_bits(forward(q, k, v, causal=causal, algorithm=algorithm), first, f"repetition {i}")


@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize("causal", CAUSAL_MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("algorithm", BACKWARD_ALGORITHMS)
def test_F57_backward_repeats(device, algorithm, dtype, causal, deterministic):
    """dK and dV always; dQ when asked to, and on the CPU always."""
    q, k, v, dout = make_qkv_dout(MANY_HEADS, dtype, device)
    options = {"causal": causal, "algorithm": algorithm, "deterministic": deterministic}
    out, lse = forward(q, k, v, **options)
    first = backward(dout, q, k, v, out, lse, **options)
    compared = slice(0, None) if deterministic or device == "cpu" else slice(1, None)
    for i in range(REPETITIONS):
        again = backward(dout, q, k, v, out, lse, **options)
        for name, a, b in zip(("dq", "dk", "dv")[compared], again[compared], first[compared], strict=True):
            assert_same_bits([a], [b], f"repetition {i} of {name}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("algorithm", BACKWARD_ALGORITHMS)
def test_F57_torch_deterministic_algorithms(device, algorithm, dtype):
    """The global setting is obeyed, and gives the bits of deterministic=True."""
    tensors = make_qkv_dout(MANY_HEADS, dtype, device)
    expected = forward_backward(*tensors, algorithm=algorithm, deterministic=True)
    torch.use_deterministic_algorithms(True)
    try:
        for i in range(3):
            assert_same_bits(forward_backward(*tensors, algorithm=algorithm), expected, f"repetition {i}")
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=dtype_name)
def test_threads_do_not_matter(dtype):
    """CPU: one thread and several give the same bits."""
    tensors = make_qkv_dout(MANY_HEADS, dtype, "cpu")
    torch.set_num_threads(1)
    one = forward_backward(*tensors, causal="bottom_right")
    for threads in (2, 3):
        torch.set_num_threads(threads)
        actual = forward_backward(*tensors, causal="bottom_right")
        assert_same_bits(actual, one, f"{threads} threads")


@pytest.mark.parametrize("causal", ["none", "bottom_right"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_F59_batch_mates_do_not_matter(device, algorithm, dtype, causal):
    """A batch entry alone, among others, and in another place: the same bits."""
    shape = Shape(5, 4, 2, length((2, 3), device), length((3, 5), device), 64)
    tensors = make_qkv_dout(shape, dtype, device)
    options = {"causal": causal, "algorithm": algorithm, "deterministic": True}
    together = forward_backward(*tensors, **options)
    for i in (0, 3):
        alone = forward_backward(*select(tensors, slice(i, i + 1)), **options)
        assert_same_bits(alone, select(together, slice(i, i + 1)), f"batch entry {i} alone")
    order = torch.tensor([3, 0, 4, 4, 2, 1, 0], device=device)
    moved = forward_backward(*select(tensors, order), **options)
    assert_same_bits(moved, select(together, order), "batch entries reordered")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_F59_other_heads_do_not_matter(device, algorithm, dtype):
    """A key head with its group of query heads, alone and among others.

    On a GPU v2's tiles depend on the number of heads, up to 16 tiles a sequence: stay beyond them. So few keys
    make its backward cut a group into all its heads, whatever their number.
    """
    rows = (12, 3) if device == "cuda" else (2, 3)
    shape = Shape(2, 9, 3, length(rows, device), length((3, 5), device), 64)
    q, k, v, dout = make_qkv_dout(shape, dtype, device)
    options = {"causal": "bottom_right", "algorithm": algorithm, "deterministic": True}
    out, lse, dq, dk, dv = forward_backward(q, k, v, dout, **options)
    group, head = slice(3, 6), slice(1, 2)
    alone = forward_backward(q[:, group], k[:, head], v[:, head], dout[:, group], **options)
    expected = (out[:, group], lse[:, group], dq[:, group], dk[:, head], dv[:, head])
    assert_same_bits(alone, expected, "one group of heads alone")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_grouped_heads_are_repeated_heads(device, algorithm, dtype):
    """Forward: the same bits as with every key head written out for each query head."""
    q, k, v, _ = make_qkv_dout(Shape(2, 6, 2, 70, 90, 40), dtype, device)
    repeated = [x.repeat_interleave(3, dim=1) for x in (k, v)]
    grouped = forward(q, k, v, causal="bottom_right", algorithm=algorithm)
    assert_same_bits(grouped, forward(q, *repeated, causal="bottom_right", algorithm=algorithm), "repeated heads")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_causal_modes_agree_on_squares(device, algorithm, dtype):
    tensors = make_qkv_dout(Shape(2, 4, 2, 101, 101, 40), dtype, device)
    options = {"algorithm": algorithm, "deterministic": True}
    bottom_right = forward_backward(*tensors, causal="bottom_right", **options)
    top_left = forward_backward(*tensors, causal="top_left", **options)
    assert_same_bits(top_left, bottom_right, "top_left of a square")


@pytest.mark.parametrize("batch", [65535, 65536, 70001])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_F04_large_batch(device, algorithm, batch):
    """More batch entries than a grid's second axis has blocks; all alike, so that all must come out alike."""
    one = make_qkv_dout(Shape(1, 2, 1, 3, 2, 8), torch.bfloat16, device)
    options = {"causal": "bottom_right", "algorithm": algorithm, "deterministic": True}
    expected = forward_backward(*one, **options)
    many = forward_backward(*(x.expand(batch, -1, -1, -1) for x in one), **options)
    assert_same_bits(many, [x.expand(batch, *x.shape[1:]) for x in expected], f"batch {batch}")


@pytest.mark.parametrize("heads", [(65536, 65536), (70001, 70001), (65538, 2)], ids="h{0[0]}-{0[1]}".format)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_F04_many_heads(device, algorithm, heads):
    q, k, v, dout = make_qkv_dout(Shape(1, *heads, 3, 2, 8), torch.bfloat16, device)
    options = {"causal": "bottom_right", "algorithm": algorithm, "deterministic": True}
    out, lse, dq, dk, dv = forward_backward(q, k, v, dout, **options)
    group = heads[0] // heads[1]
    last_q, last_kv = slice(heads[0] - group, None), slice(heads[1] - 1, None)
    alone = forward_backward(q[:, last_q], k[:, last_kv], v[:, last_kv], dout[:, last_q], **options)
    expected = (out[:, last_q], lse[:, last_q], dq[:, last_q], dk[:, last_kv], dv[:, last_kv])
    assert_same_bits(alone, expected, "the last head")
