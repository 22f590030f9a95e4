"""The implementations that are compared, and the check each must pass before it is timed.

A baseline is called with (q, k, v, causal) and returns the output; gradients come from autograd.
"""

import functools
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import flash_ext


def naive(q, k, v, causal):
    """softmax(mask(q @ k.T * scale)) @ v, one torch operator after the other, as textbooks write it."""
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return torch.softmax(scores, dim=-1) @ v


def sdpa(q, k, v, causal):
    """torch's attention with the backend of its own choice."""
    # enable_gqa rules some backends out even when the head counts are equal.
    gqa = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, **gqa)


def sdpa_backend(backend):
    def run(q, k, v, causal):
        # A refused backend warns about each of its rules; the exception that follows is enough.
        with warnings.catch_warnings(), sdpa_kernel(backend):
            warnings.simplefilter("ignore")
            return sdpa(q, k, v, causal)

    return run


def flash(algorithm, **options):
    def run(q, k, v, causal):
        return flash_ext.flash_attention(q, k, v, causal=causal, algorithm=algorithm, **options)

    return run


@dataclass(frozen=True)
class Baseline:
    name: str
    run: Callable
    dtypes: tuple[str, ...] = ("fp16", "bf16", "fp32")
    devices: tuple[str, ...] = ("cuda", "cpu")
    # Matrices of seqlen x seqlen per head alive at once, in (forward, backward); 0: linear memory.
    score_copies: tuple[int, int] = (0, 0)
    shares_backward_of: str | None = None
    capability: tuple[int, int] | None = None  # the one it needs

    def refusal(self, case, pass_name, device):
        """Why this baseline is not run on a case, or None."""
        if device.type not in self.devices:
            return f"not available on {device.type}"
        if self.capability and torch.cuda.get_device_capability(device) != self.capability:
            return "needs compute capability {}.{}".format(*self.capability)
        if case.dtype not in self.dtypes:
            return f"takes {' and '.join(self.dtypes)} only"
        if pass_name == "backward" and self.shares_backward_of:
            return f"shares the backward of {self.shares_backward_of}"
        need = self.score_copies[pass_name == "backward"] * case.scores_bytes
        limit = available_memory(device) if need else 0
        if need > limit:
            return f"needs about {need / 2**30:.0f} GiB, {limit / 2**30:.0f} GiB are free"
        return None


def v3_runs_on(device):
    return torch.cuda.get_device_capability(device) == BASELINES["flash_ext_v3"].capability


def available_memory(device):
    """Bytes a baseline may use: what is free, with a margin for the allocator."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return 0.85 * (free + cached)
    return 0.25 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


HALF = ("fp16", "bf16")
ON_HOPPER = {"dtypes": HALF, "devices": ("cuda",), "capability": (9, 0)}
BASELINES = {
    baseline.name: baseline
    for baseline in (
        Baseline("naive", naive, score_copies=(3, 5)),
        Baseline("sdpa", sdpa),
        Baseline("sdpa_flash", sdpa_backend(SDPBackend.FLASH_ATTENTION), dtypes=HALF, devices=("cuda",)),
        Baseline("sdpa_cudnn", sdpa_backend(SDPBackend.CUDNN_ATTENTION), dtypes=HALF, devices=("cuda",)),
        Baseline("sdpa_efficient", sdpa_backend(SDPBackend.EFFICIENT_ATTENTION), devices=("cuda",)),
        # It computes 16-bit inputs in fp32, so a copy of its scores is up to twice the size.
        Baseline("sdpa_math", sdpa_backend(SDPBackend.MATH), score_copies=(6, 10)),
        Baseline("flash_ext_v1", flash("v1"), shares_backward_of="flash_ext_v2"),
        Baseline("flash_ext_v2", flash("v2")),
        Baseline("flash_ext_v3", flash("v3"), **ON_HOPPER),
        Baseline("flash_ext_v3_deterministic", flash("v3", deterministic=True), **ON_HOPPER),
    )
}
# What is compared with others: a mode of ours is compared with ours alone.
DEMO_BASELINES = tuple(name for name in BASELINES if name != "flash_ext_v3_deterministic")
# The columns of the grid; "sdpa" is one of its backends there.
GRID_BASELINES = tuple(name for name in DEMO_BASELINES if name != "sdpa")

# Largest relative Frobenius error of an output and of a gradient. They tell a right kernel from a
# wrong one (and TF32 from fp32), no more: accuracy is the tests' business.
TOLERANCE = {"fp16": (3e-3, 6e-3), "bf16": (2e-2, 4e-2), "fp32": (5e-5, 1e-4)}
SAMPLED_ROWS = 64
GRADIENT_CHECK_SEQLEN = 256


def use_full_fp32():
    """fp32 products of the naive baselines are fp32, not TF32."""
    torch.set_float32_matmul_precision("highest")


def relative_error(got, expected):
    """Frobenius norm of the difference over that of `expected`; infinite for non-finite results."""
    if not torch.isfinite(got).all():
        return float("inf")
    expected = expected.double()
    return ((got.double() - expected).norm() / expected.norm()).item()


def check_forward(baseline, case, q, k, v):
    """Error text or None: the first and last rows of the last head of the very inputs that are timed."""
    with torch.no_grad():
        out = baseline.run(q, k, v, case.causal)[-1:, -1:]
    head = q[-1:, -1:], k[-1:, -1:], v[-1:, -1:]
    rows = min(SAMPLED_ROWS, case.seqlen)
    worst = 0.0
    for first in (0, case.seqlen - rows):
        # Row i sees the keys 0..i when causal: cut after the last of them, and align bottom-right.
        last_key = first + rows if case.causal else case.seqlen
        q_rows, k_rows, v_rows = head[0][:, :, first : first + rows], *(x[:, :, :last_key] for x in head[1:])
        expected, _ = flash_ext.attention_reference(q_rows, k_rows, v_rows, causal=case.causal)
        worst = max(worst, relative_error(out[:, :, first : first + rows], expected))
    return _verdict("output", worst, TOLERANCE[case.dtype][0])


@functools.cache
def check_backward(name, case, device):
    """Error text or None: all three gradients of a small problem of the case's kind."""
    q, k, v, dout = case.make_inputs(device, seed=1)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    got = torch.autograd.grad(BASELINES[name].run(*leaves, case.causal), leaves, dout)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    out, _ = flash_ext.attention_reference(*exact, causal=case.causal)
    expected = torch.autograd.grad(out, exact, dout.double())
    worst = max(relative_error(g, e) for g, e in zip(got, expected, strict=True))
    return _verdict("gradients", worst, TOLERANCE[case.dtype][1])


def small_problem(case):
    """The case cut down to one group of heads of one short sequence."""
    group = case.heads // case.kv_heads
    return case.with_(
        batch=1,
        heads=group,
        heads_kv=1 if group > 1 else None,
        seqlen=min(case.seqlen, GRADIENT_CHECK_SEQLEN),
    )


def _verdict(what, error, tolerance):
    if error <= tolerance:
        return None
    return f"{what} off by {error:.1e} (relative), allowed {tolerance:.0e}"
