"""What the arguments of `flash_attention` do to the softmax weights, drawn by its own kernels.

With q = k = 0 every visible key of a query weighs the same, and with v = the unit matrix a row of `out` is
that query's weights. Runs anywhere; writes a PNG.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch

import flash_ext
from benchmarks.plots import RC

SEQLEN = 128
SCORE_BLOCK = 64  # the smallest of block_mask


def pictures():
    """Map a title to the arguments of a call of one head."""
    checkers = torch.tensor([[True, False], [False, True]])
    ramp = torch.linspace(-3.0, 3.0, SEQLEN).expand(SEQLEN, SEQLEN)
    return {
        "causal=True": {"causal": True},
        "window=(24, 8)": {"window": (24, 8)},
        "attn_mask (float)": {"attn_mask": ramp},
        "alibi_slopes=[0.05]": {"alibi_slopes": torch.tensor([0.05]), "causal": True},
        "dropout_p=0.3": {"dropout_p": 0.3, "rng_state": torch.tensor([1, 2]), "causal": True},
        "seqlens_k=[90]": {"seqlens_k": torch.tensor([90], dtype=torch.int32)},
        "block_mask": {"block_mask": checkers[None, None], "block_size": SCORE_BLOCK, "causal": True},
        "cu_seqlens=[0, 30, 50, 128]": packed((0, 30, 50, SEQLEN)),
    }


def packed(boundaries):
    """Return the arguments of packed, causal sequences."""
    cu_seqlens = torch.tensor(boundaries, dtype=torch.int32)
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    return dict(zip(names, (cu_seqlens, cu_seqlens, SEQLEN, SEQLEN), strict=True)) | {"causal": True}


def weights(arguments):
    """Return the (SEQLEN, SEQLEN) softmax weights of a call, each row relative to its largest."""
    zeros, unit = torch.zeros(1, 1, SEQLEN, SEQLEN), torch.eye(SEQLEN)[None, None]
    if "cu_seqlens_q" in arguments:
        zeros, unit = zeros[0].transpose(0, 1), unit[0].transpose(0, 1)
        return scaled(flash_ext.flash_attention(zeros, zeros, unit, **arguments)[:, 0])
    return scaled(flash_ext.flash_attention(zeros, zeros, unit, **arguments)[0, 0])


def scaled(out):
    return out / out.amax(-1, keepdim=True).clamp_min(1e-30)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/masks.png"))
    options = parser.parse_args()
    drawings = pictures()
    with plt.rc_context(RC | {"axes.grid": False}):
        figure, axes = plt.subplots(2, len(drawings) // 2, figsize=(10.5, 5.6))
        for axis, (title, arguments) in zip(axes.flat, drawings.items(), strict=True):
            axis.imshow(weights(arguments), cmap="Reds", vmin=0, vmax=1, interpolation="nearest")
            axis.set_title(title, fontsize=9)
            axis.set_xticks([])
            axis.set_yticks([])
        axes[0, 0].set_ylabel("queries")
        axes[0, 0].set_xlabel("keys")
        figure.savefig(options.output, dpi=110)
    print(f"plot: {options.output}")


if __name__ == "__main__":
    main()
