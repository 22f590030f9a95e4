"""A small sweep of every kernel instance for compute-sanitizer to watch.

Every algorithm, dtype and compiled head_dim (and one below it, so that padding is exercised), lengths
around the tile edges, with and without mask, forward and backward; and every argument of general attention,
malformed lengths among them. Run by gpu_check with
PYTORCH_NO_CUDA_MEMORY_CACHING=1: each tensor is then an allocation of its own with nothing behind it.
With --plant-bug it reads past the end of an allocation on purpose: a checker that says nothing about
that is not checking.
"""

import argparse
import itertools
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


def run(q, k, v, **options):
    """A call and its gradients."""
    out, lse = flash_ext.flash_attention(q, k, v, return_lse=True, **options)
    (out.float().sum() + lse.masked_fill(lse.isinf(), 0.0).sum()).backward()


def general_options(seqlen_q, seqlen_k, dtype):
    """Arguments beyond plain attention for four query heads of one sequence."""

    def leaf(*shape):
        return torch.randn(*shape, device="cuda", dtype=dtype).requires_grad_()

    # Rows that begin at multiples of 16 bytes, as v3 wants them.
    mask = torch.randn(1, 4, seqlen_q, -(-seqlen_k // 16) * 16, device="cuda", dtype=dtype)[..., :seqlen_k]
    blocks = torch.rand(1, 4, -(-seqlen_q // 64), -(-seqlen_k // 64), device="cuda") < 0.5
    yield {"window": (20, 70)}
    yield {"softcap": 5.0}
    yield {"alibi_slopes": torch.rand(4, device="cuda")}
    yield {"sinks": leaf(4)}
    yield {"dropout_p": 0.3}
    yield {"attn_mask": mask.detach().requires_grad_()}
    yield {"attn_mask": leaf(1, 1, 1, seqlen_k)}
    yield {"attn_mask": mask > 0, "dropout_p": 0.3}
    yield {"block_mask": blocks, "block_size": 64}
    yield {"block_mask": blocks[:, :1, ::4, ::4], "block_size": 256}
    for length in (0, seqlen_k // 2, 2**31 - 1):
        yield {"seqlens_k": torch.tensor([length], device="cuda", dtype=torch.int32)}


def packed_options(total):
    """Lengths of packed sequences, well-formed or not."""
    for offsets in ((0, 0, total // 3, total), (5, 9, 4, total // 2), (-7, total // 2, 10**9, 2**31 - 1)):
        lengths = torch.tensor(offsets, device="cuda", dtype=torch.int32)
        yield {"cu_seqlens_q": lengths, "cu_seqlens_k": lengths, "max_seqlen_q": total, "max_seqlen_k": total}


def general_sweep():
    """The same of general attention: by v2's kernels, and by those that "auto" takes."""
    calls = 0
    for algorithm, dtype, head_dim in itertools.product(("v2", "auto"), HALF, (64, 40, 128, 104)):

        def leaf(*shape, dtype=DTYPES[dtype], head_dim=head_dim):
            return torch.randn(*shape, head_dim, device="cuda", dtype=dtype).requires_grad_()

        for seqlen_q, seqlen_k in ((1, 129), (129, 64), (257, 300)):
            for options in general_options(seqlen_q, seqlen_k, DTYPES[dtype]):
                q, k, v = leaf(1, 4, seqlen_q), leaf(1, 2, seqlen_k), leaf(1, 2, seqlen_k)
                run(q, k, v, causal=calls % 2 == 1, algorithm=algorithm, **options)
                calls += 1
            for options in packed_options(seqlen_k):
                q, k, v = leaf(seqlen_k, 4), leaf(seqlen_k, 2), leaf(seqlen_k, 2)
                run(q, k, v, causal=calls % 2 == 1, algorithm=algorithm, **options)
                calls += 1
        torch.cuda.synchronize()
    return calls


def sweep():
    """Run all calls of plain attention; return how many there were."""
    generator = torch.Generator("cuda").manual_seed(0)

    def tensor(*shape, dtype):
        return torch.randn(*shape, device="cuda", dtype=dtype, generator=generator).requires_grad_()

    calls = 0
    for algorithm, dtype, head_dim in instances():
        for seqlen_q, seqlen_k in LENGTHS:
            for causal, deterministic in ((False, True), (True, False), (True, True)):
                q = tensor(1, 4, seqlen_q, head_dim, dtype=DTYPES[dtype])
                k, v = (tensor(1, 1, seqlen_k, head_dim, dtype=DTYPES[dtype]) for _ in range(2))
                run(q, k, v, causal=causal, algorithm=algorithm, deterministic=deterministic)
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
        print(f"calls: {sweep() + general_sweep()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
