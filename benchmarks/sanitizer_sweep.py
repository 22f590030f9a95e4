"""A small sweep of every kernel instance for compute-sanitizer to watch.

Every algorithm, dtype and compiled head_dim (and one below it, so that padding is exercised), lengths
around the tile edges, with and without mask, forward and backward. Run by gpu_check with
PYTORCH_NO_CUDA_MEMORY_CACHING=1: each tensor is then an allocation of its own with nothing behind it.
With --plant-bug it reads past the end of an allocation on purpose: a checker that says nothing about
that is not checking.
"""

import argparse
import sys

import torch

import flash_ext
from benchmarks.baselines import HALF, v3_runs_on
from benchmarks.cases import DTYPES

# (seqlen_q, seqlen_k). v2's backward cuts the four query heads of the longest into parts.
LENGTHS = ((0, 17), (17, 0), (1, 129), (17, 64), (64, 17), (129, 129), (257, 300))
# Each kernel's own head_dim and one that it pads.
HEAD_DIMS = (64, 40, 128, 100, 256, 193)
HEAD_DIMS_V3 = (64, 40, 96, 88, 128, 104, 192, 136, 256, 200)


def instances():
    """(algorithm, dtype, head_dim)."""
    for algorithm in ("v1", "v2"):
        yield from ((algorithm, dtype, head_dim) for dtype in DTYPES for head_dim in HEAD_DIMS)
    if v3_runs_on("cuda"):
        yield from (("v3", dtype, head_dim) for dtype in HALF for head_dim in HEAD_DIMS_V3)


def sweep():
    """Run all calls; return how many there were."""
    generator = torch.Generator("cuda").manual_seed(0)

    def tensor(*shape, dtype):
        return torch.randn(*shape, device="cuda", dtype=dtype, generator=generator).requires_grad_()

    calls = 0
    for algorithm, dtype, head_dim in instances():
        for seqlen_q, seqlen_k in LENGTHS:
            for causal, deterministic in ((False, True), (True, False), (True, True)):
                q = tensor(1, 4, seqlen_q, head_dim, dtype=DTYPES[dtype])
                k, v = (tensor(1, 1, seqlen_k, head_dim, dtype=DTYPES[dtype]) for _ in range(2))
                out, lse = flash_ext.flash_attention(
                    *(q, k, v),
                    causal=causal,
                    algorithm=algorithm,
                    return_lse=True,
                    deterministic=deterministic,
                )
                finite_lse = lse.masked_fill(lse.isinf(), 0.0)
                (out.float().sum() + finite_lse.sum()).backward()
                calls += 1
        torch.cuda.synchronize()
    return calls


def plant_bug():
    """A forward whose k lost its memory: the kernel reads past the end of a 16-byte allocation.

    v2's, whose loads the checker sees: v3's are made by TMA.
    """
    q, k, v = (torch.randn(1, 1, 4096, 64, device="cuda", dtype=torch.float16) for _ in range(3))
    k.untyped_storage().resize_(16)
    flash_ext.flash_attention(q, k, v, algorithm="v2")
    torch.cuda.synchronize()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plant-bug", action="store_true")
    if parser.parse_args().plant_bug:
        plant_bug()
    else:
        print(f"calls: {sweep()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
