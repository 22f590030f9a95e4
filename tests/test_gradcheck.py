"""torch.autograd.gradcheck against finite differences: fp64, on the CPU kernels."""

import pytest
import torch
from calls import CPU_ALGORITHMS, forward
from inputs import Shape, make_qkv
from matrix import CAUSAL_MODES

import flash_ext

SHAPES = (
    Shape(1, 1, 1, 1, 1, 1),
    Shape(2, 2, 2, 5, 5, 4),
    Shape(1, 4, 2, 7, 3, 3),
    Shape(1, 3, 1, 3, 7, 8),
    Shape(2, 2, 1, 4, 9, 5),
)
WANTED = ((True, True, True), (True, False, False), (False, True, False), (False, False, True))


def wanted_name(wanted):
    return "".join(name for name, flag in zip("qkv", wanted, strict=True) if flag)


@pytest.mark.parametrize("wanted", WANTED, ids=wanted_name)
@pytest.mark.parametrize("causal", CAUSAL_MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("algorithm", CPU_ALGORITHMS)
def test_gradcheck(algorithm, shape, causal, wanted):
    """Through out and lse; tiles of 2 x 3 cut even these shapes."""
    leaves = [x.requires_grad_(f) for x, f in zip(make_qkv(shape, torch.float64, "cpu"), wanted, strict=True)]

    def function(q, k, v):
        out, lse = forward(q, k, v, causal=causal, scale=0.6, algorithm=algorithm, tile=(2, 3))
        return out, lse.masked_fill(lse.isinf(), 0)

    assert torch.autograd.gradcheck(function, leaves, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("causal", [False, True, "top_left"])
def test_gradcheck_of_the_interface(causal):
    leaves = [x.requires_grad_() for x in make_qkv(Shape(2, 2, 1, 4, 6, 3), torch.float64, "cpu")]
    assert torch.autograd.gradcheck(lambda q, k, v: flash_ext.flash_attention(q, k, v, causal=causal), leaves)


def test_F53_gradgradcheck_raises():
    leaves = [x.requires_grad_() for x in make_qkv(Shape(1, 1, 1, 3, 3, 2), torch.float64, "cpu")]
    with pytest.raises(RuntimeError, match="not differentiable"):
        torch.autograd.gradgradcheck(flash_ext.flash_attention, leaves)
