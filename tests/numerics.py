"""Accuracy gates: how far a result may lie from the exact one.

The yardstick is the reference in fp64 on the same rounded inputs. Two gates:

* `check_forward` and `check_gradients` measure every error in units of what a right kernel is expected to
  leave at that element (error_model.py): its RMS over the tensor, over the worst row, and the largest one.
  They hold for every shape, dtype and data family, and one wrong row or tile cannot hide in an average.
* `assert_tight` compares with the rounding floor, the RMS error of merely rounding the exact result, and
  with naive, the textbook formula evaluated in the inputs' dtype. It needs sizeable, ordinary inputs.
"""

import math
from dataclasses import dataclass

import torch
from error_model import ErrorModel, rounding_variance, ulp

from flash_ext import attention_reference

# ---- the exact result and the naive one ----------------------------------------------------------


def causal_argument(mode):
    """The operators' causal string as flash_attention and attention_reference take it."""
    return False if mode == "none" else mode


def visible_keys(causal, seqlen_q, seqlen_k, device):
    visible = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=device)
    if causal == "none":
        return visible
    return visible.tril(seqlen_k - seqlen_q if causal == "bottom_right" else 0)


def default_scale(q, scale):
    return q.shape[-1] ** -0.5 if scale is None else scale


def naive_attention(q, k, v, *, causal="none", scale=None):
    """The textbook formula with every step rounded to the inputs' dtype."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    visible = visible_keys(causal, q.shape[2], k.shape[2], q.device)
    empty = ~visible.any(-1, keepdim=True)
    scores = (q @ k.mT) * default_scale(q, scale)
    scores = scores.masked_fill(~visible & ~empty, -math.inf)
    return torch.softmax(scores, -1).masked_fill(empty, 0) @ v


def _leaves(tensors, dtype):
    return [x.detach().to(dtype).requires_grad_() for x in tensors]


def reference_gradients(q, k, v, dout, *, dlse=None, causal="none", scale=None):
    """(out, lse, dq, dk, dv) in fp64."""
    leaves = _leaves((q, k, v), torch.float64)
    out, lse = attention_reference(*leaves, causal=causal_argument(causal), scale=scale)
    objective = (out * dout.double()).sum()
    if dlse is not None:
        objective = objective + (lse.masked_fill(lse == -math.inf, 0.0) * dlse.double()).sum()
    return out.detach(), lse.detach(), *torch.autograd.grad(objective, leaves)


def naive_gradients(q, k, v, dout, *, causal="none", scale=None):
    leaves = _leaves((q, k, v), q.dtype)
    return torch.autograd.grad(naive_attention(*leaves, causal=causal, scale=scale), leaves, dout)


# ---- measures ------------------------------------------------------------------------------------


def rms(x, dim=None):
    x = x.double().square()
    return x.mean().sqrt() if dim is None else x.mean(dim).sqrt()


def relative_error(actual, reference):
    """In the Frobenius norm."""
    return ((actual.double() - reference).norm() / reference.norm().clamp(min=1e-300)).item()


def _require(measured, allowed, what, quantity):
    # `not <=`: NaN fails.
    if not measured <= allowed:
        raise AssertionError(f"{what}: {quantity} is {measured:.4g}, allowed {allowed:.4g}")


def assert_same_shape(actual, reference, what):
    assert actual.shape == reference.shape, f"{what}: {tuple(actual.shape)} is not {tuple(reference.shape)}"


def assert_same_infinities(actual, reference, what):
    """Infinities where the reference has them, finite numbers everywhere else."""
    good = torch.where(reference.isinf(), actual.double() == reference, actual.isfinite())
    if not good.all():
        where = tuple((~good).nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int((~good).sum())} elements are not finite where they should be or the reverse, "
            f"first at {where}: {actual[where].item()} where the reference has {reference[where].item()}"
        )


# ---- where to judge ------------------------------------------------------------------------------

# Scores up to which the CPU judges what a GPU has computed. The reference and the error model are
# hundreds of operations: small ones cost a GPU their launches, and processes that share it a turn for each.
MAX_SCORES_ON_CPU = 1 << 18


def where_judged(q, k, *others):
    """All of them, on the CPU if they are small. What is no tensor stays as it is."""
    if not q.is_cuda or q.numel() // q.shape[-1] * k.shape[2] > MAX_SCORES_ON_CPU:
        return q, k, *others
    copies = [x.to("cpu", non_blocking=True) if isinstance(x, torch.Tensor) else x for x in (q, k, *others)]
    torch.cuda.synchronize(q.device)
    return copies


# ---- the gate in units of the expected error -----------------------------------------------------


@dataclass(frozen=True)
class Sigmas:
    """Allowed errors in units of the expected one: RMS of all elements, RMS of the worst row, largest."""

    rms: float
    row: float
    largest: float


# The CPU kernels, and an emulation that rounds where tensor cores make it, reach 1.7, 3.2 and 5.6 in fp16
# and bf16, and 3.8, 7.4 and 17 in fp32 and fp64, over all data families and shapes up to 300 x 300 x 256.
HALF_GATE = Sigmas(rms=2.0, row=4.5, largest=9.0)
FULL_GATE = Sigmas(rms=5.0, row=10.0, largest=24.0)


def assert_within(actual, reference, sigma, what):
    assert_same_shape(actual, reference, what)
    if actual.numel() == 0:
        return
    assert_same_infinities(actual, reference, what)
    gate = FULL_GATE
    if actual.dtype in (torch.float16, torch.bfloat16):
        gate = HALF_GATE
    error = (actual.double() - reference) / sigma.clamp(min=1e-300)
    # Few samples scatter more; errors within a row are not independent, so rows are what is counted.
    rows = error.numel() / error.shape[-1]
    allowed = gate.rms * (1 + 2 / math.sqrt(rows))
    _require(rms(error).item(), allowed, what, "RMS error in units of the expected")
    worst = rms(error, dim=-1)
    where = tuple((worst == worst.max()).nonzero()[0].tolist())
    allowed = gate.row * (1 + 2 / math.sqrt(error.shape[-1]))
    _require(worst.max().item(), allowed, what, f"RMS error of row {where} in units of the expected")
    where = tuple((error.abs() == error.abs().max()).nonzero()[0].tolist())
    _require(error.abs().max().item(), gate.largest, what, f"error at {where} in units of the expected")


def assert_lse(actual, reference, sigma=0.0):
    """`sigma` makes room where scores cancel out of much larger terms."""
    assert_same_shape(actual, reference, "lse")
    if actual.numel() == 0:
        return
    assert_same_infinities(actual, reference, "lse")
    rtol, atol = (4e-6, 1e-5) if actual.dtype == torch.float32 else (1e-13, 1e-13)
    error = (actual.double() - reference).abs().nan_to_num(0.0)
    excess = error - (atol + rtol * reference.abs().nan_to_num(0.0, posinf=0.0) + 4 * sigma)
    where = tuple((excess == excess.max()).nonzero()[0].tolist())
    _require(excess.max().item(), 0.0, "lse", f"error beyond {atol:g} + {rtol:g} * |lse| at {where}")


def _model(q, k, v, out, lse, causal, scale, is_cuda):
    visible = visible_keys(causal, q.shape[2], k.shape[2], q.device)
    return ErrorModel(q, k, v, out, lse, visible, default_scale(q, scale), is_cuda=is_cuda)


def check_forward(out, lse, q, k, v, *, causal="none", scale=None):
    is_cuda = q.is_cuda
    q, k, v, out, lse = where_judged(q, k, v, out, lse)
    exact, exact_lse = attention_reference(q, k, v, causal=causal_argument(causal), scale=scale)
    assert out.dtype == q.dtype
    assert lse.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
    model = _model(q, k, v, exact, exact_lse, causal, scale, is_cuda)
    assert_lse(lse, exact_lse, model.lse_sigma())
    assert_within(out, exact, model.out_sigma(), "out")


def check_gradients(gradients, q, k, v, dout, *, dlse=None, causal="none", scale=None):
    """`gradients` is (dq, dk, dv); None where one was not asked for."""
    is_cuda = q.is_cuda
    q, k, v, dout, dlse, *gradients = where_judged(q, k, v, dout, dlse, *gradients)
    out, lse, *exact = reference_gradients(q, k, v, dout, dlse=dlse, causal=causal, scale=scale)
    sigmas = _model(q, k, v, out, lse, causal, scale, is_cuda).gradient_sigmas(dout, dlse, *exact)
    for name, actual, *expected in zip(("dq", "dk", "dv"), gradients, exact, sigmas, strict=True):
        if actual is not None:
            assert actual.dtype == q.dtype
            assert_within(actual, *expected, name)


# ---- the gate against the rounding floor and against naive ---------------------------------------


@dataclass(frozen=True)
class TightGate:
    """RMS error over the rounding floor, RMS error over naive's, largest error over naive's."""

    floor: float
    naive: float
    naive_largest: float


TIGHT_FORWARD = TightGate(floor=1.6, naive=0.75, naive_largest=1.0)
TIGHT_BACKWARD = TightGate(floor=2.5, naive=0.8, naive_largest=1.3)


def assert_tight(actual, reference, naive, gate, what):
    assert_same_infinities(actual, reference, what)
    error, naive_error = actual.double() - reference, naive.double() - reference
    floor = rounding_variance(reference, actual.dtype).mean().sqrt().item()
    measured = rms(error).item()
    _require(measured, gate.floor * floor, what, "RMS error, limited by the rounding floor,")
    _require(measured, gate.naive * rms(naive_error).item(), what, "RMS error, limited by naive's,")
    allowed = gate.naive_largest * naive_error.abs().max().item()
    allowed += ulp(reference.abs().max(), actual.dtype).item()
    _require(error.abs().max().item(), allowed, what, "largest error, limited by naive's,")
