"""The operators as the tests call them: with small tiles on the CPU, and compared bit by bit."""

import torch
from matrix import CPU_TILE

import flash_ext  # noqa: F401  (registers the operators)

ALGORITHMS = ("v1", "v2")


def default_tile(tensor):
    return CPU_TILE if tensor.device.type == "cpu" else None


def forward(q, k, v, *, causal="none", scale=None, algorithm="auto", deterministic=False, tile=None):
    """(out, lse); differentiable."""
    tile = tile or default_tile(q)
    return torch.ops.flash_ext.forward(q, k, v, scale, causal, algorithm, deterministic, tile)


def backward(dout, q, k, v, out, lse, *, needs=(True, True, True), tile=None, **options):
    """(dq, dk, dv) from the operator itself."""
    tile = tile or default_tile(q)
    return torch.ops.flash_ext.backward(dout, q, k, v, out, lse, needs=list(needs), tile=tile, **options)


def forward_backward(q, k, v, dout, *, dlse=None, algorithm="auto", **options):
    """(out, lse, dq, dk, dv) of one forward and one backward operator."""
    out, lse = forward(q, k, v, algorithm=algorithm, **options)
    return out, lse, *backward(dout, q, k, v, out, lse, dlse=dlse, **options)


def bits(tensor):
    """The tensor's bit pattern: equal bits also tell 0 from -0 and one NaN from another."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(integers[tensor.element_size()])


def assert_same_bits(actual, expected, what):
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), actual, expected, strict=False):
        assert a.shape == b.shape, f"{what}: {name} has shape {tuple(a.shape)}, not {tuple(b.shape)}"
        different = bits(a) != bits(b)
        if different.any():
            where = tuple(different.nonzero()[0].tolist())
            raise AssertionError(
                f"{what}: {int(different.sum())} of {a.numel()} elements of {name} differ in their bits, "
                f"first at {where}: {a[where].item()!r} is not {b[where].item()!r}"
            )
