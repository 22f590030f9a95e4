"""The operators as the tests call them: with small tiles on the CPU, and compared bit by bit."""

from contextlib import contextmanager

import torch
from inputs import ALIGNED_LAYOUTS
from matrix import CPU_TILE, HALF_DTYPES

import flash_ext

CPU_ALGORITHMS = ("v1", "v2")
ALGORITHMS = (*CPU_ALGORITHMS, "v3")
BACKWARD_ALGORITHMS = ("v2", "v3")  # v1's gradients come from v2's kernels


def serves(algorithm=None, device="cuda", dtype=torch.bfloat16, head_dim=64, layout="contiguous", **_):
    """Whether an algorithm takes inputs like these, as csrc/v3/refusal.h has it. The arguments are named as
    the parameters of tests are: conftest.py drops the combinations that are not served."""
    is_aligned = head_dim % 8 == 0 and layout in ALIGNED_LAYOUTS
    return algorithm != "v3" or (device == "cuda" and dtype in HALF_DTYPES and is_aligned)


def missing_for(algorithm):
    """What this machine or this build would need to run an algorithm, or None."""
    if algorithm != "v3":
        return None
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        return "an NVIDIA GPU of compute capability 9.0"
    return None if "backward_v3" in flash_ext.build_info()["kernels"] else "a build for sm_90a"


def fastest(**inputs):
    """What algorithm="auto" takes for more than one head of inputs that are described as to `serves`."""
    return "v3" if serves("v3", **inputs) and missing_for("v3") is None else "v2"


def default_tile(tensor):
    return CPU_TILE if tensor.device.type == "cpu" else None


def forward(q, k, v, *, causal="none", scale=None, algorithm="auto", deterministic=False, tile=None):
    """(out, lse); differentiable."""
    tile = tile or default_tile(q)
    return torch.ops.flash_ext.forward(q, k, v, scale, causal, algorithm, deterministic, tile)


def backward(dout, q, k, v, out, lse, *, needs=(True, True, True), tile=None, **options):
    """(dq, dk, dv) from the operator itself; `options` are its other arguments."""
    tile = tile or default_tile(q)
    return torch.ops.flash_ext.backward(dout, q, k, v, out, lse, needs=list(needs), tile=tile, **options)


def forward_backward(q, k, v, dout, *, dlse=None, algorithm="auto", **options):
    """(out, lse, dq, dk, dv) of one forward and one backward operator."""
    out, lse = forward(q, k, v, algorithm=algorithm, **options)
    return out, lse, *backward(dout, q, k, v, out, lse, dlse=dlse, algorithm=algorithm, **options)


def bits(tensor):
    """The tensor's bit pattern: equal bits also tell 0 from -0 and one NaN from another."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(integers[tensor.element_size()])


RESULTS = ("out", "lse", "dq", "dk", "dv")


def assert_same_bits(actual, expected, what, names=RESULTS):
    """`actual` and `expected` are the first of `names`, or fewer."""
    assert len(actual) == len(expected) <= len(names)
    for name, a, b in zip(names, actual, expected, strict=False):
        assert a.shape == b.shape, f"{what}: {name} has shape {tuple(a.shape)}, not {tuple(b.shape)}"
        different = bits(a) != bits(b)
        if different.any():
            where = tuple(different.nonzero()[0].tolist())
            raise AssertionError(
                f"{what}: {int(different.sum())} of {a.numel()} elements of {name} differ in their bits, "
                f"first at {where}: {a[where].item()!r} is not {b[where].item()!r}"
            )


@contextmanager
def nan_in_fresh_memory():
    """NaN in all memory that torch hands out uninitialised, results and workspace alike."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def assert_nan_in_fresh_memory_does_not_show(tensors, **options):
    expected = forward_backward(*tensors, **options)
    with nan_in_fresh_memory():
        actual = forward_backward(*tensors, **options)
    assert_same_bits(actual, expected, "uninitialised memory filled with NaN")


def assert_subset_of_gradients(q, k, v, dout, needs, **options):
    """Each gradient is the same whatever else is asked for; what is not asked for is empty."""
    out, lse = forward(q, k, v, **options)
    everything = backward(dout, q, k, v, out, lse, **options)
    some = backward(dout, q, k, v, out, lse, needs=needs, **options)
    for need, gradient, expected in zip(needs, some, everything, strict=True):
        if need:
            assert_same_bits([gradient], [expected], "a subset of the gradients")
        else:
            assert gradient.numel() == 0


def extra_memory(call):
    """Peak bytes that `call` asks for beyond what is held before it, results included."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
