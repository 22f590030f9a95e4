"""What is measured: one attention problem, its inputs and its floating-point operations."""

from dataclasses import dataclass, replace

import torch

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
PASSES = ("forward", "backward")


@dataclass(frozen=True)
class AttentionCase:
    """Self-attention over `batch` sequences; `heads_kv` < `heads` is grouped-query attention."""

    batch: int
    heads: int
    seqlen: int
    head_dim: int
    dtype: str = "fp16"
    causal: bool = False
    heads_kv: int | None = None
    # Memory order of the tensors; kernels always see (batch, heads, seqlen, head_dim) views.
    layout: str = "bhsd"

    @property
    def kv_heads(self):
        return self.heads if self.heads_kv is None else self.heads_kv

    @property
    def torch_dtype(self):
        return DTYPES[self.dtype]

    @property
    def itemsize(self):
        return self.torch_dtype.itemsize

    @property
    def io_bytes(self):
        """Bytes of q, k, v and out together."""
        return 2 * self.batch * (self.heads + self.kv_heads) * self.seqlen * self.head_dim * self.itemsize

    @property
    def scores_bytes(self):
        """Bytes of one seqlen x seqlen matrix per head, in the input's dtype."""
        return self.batch * self.heads * self.seqlen**2 * self.itemsize

    def label(self):
        """batch x heads x seqlen x head_dim, dtype, mask; two head counts are q's and k's."""
        heads = f"{self.heads}" if self.kv_heads == self.heads else f"{self.heads}/{self.kv_heads}"
        causal = " causal" if self.causal else ""
        return f"{self.batch}x{heads}x{self.seqlen}x{self.head_dim} {self.dtype}{causal}"

    def record(self):
        """The columns that identify this case in a results file."""
        row = {
            "dtype": self.dtype,
            "head_dim": self.head_dim,
            "causal": self.causal,
            "seqlen": self.seqlen,
            "batch": self.batch,
            "heads": self.heads,
        }
        if self.kv_heads != self.heads:
            row["heads_kv"] = self.kv_heads
        return row

    def with_(self, **changes):
        return replace(self, **changes)

    def make_inputs(self, device, seed=0):
        """Standard-normal (q, k, v, dout)."""
        generator = torch.Generator(device=device).manual_seed(seed)

        def tensor(heads):
            sizes = (heads, self.seqlen) if self.layout == "bhsd" else (self.seqlen, heads)
            x = torch.randn(
                self.batch, *sizes, self.head_dim, device=device, dtype=self.torch_dtype, generator=generator
            )
            return x if self.layout == "bhsd" else x.transpose(1, 2)

        return tensor(self.heads), tensor(self.kv_heads), tensor(self.kv_heads), tensor(self.heads)


def attention_flops(case, pass_name):
    """Operations of the two (forward) or five (backward) matrix products; half of them when causal.

    The papers' convention, whatever an implementation really executes.
    """
    forward = 4 * case.batch * case.heads * case.seqlen**2 * case.head_dim
    if case.causal:
        forward /= 2
    return forward * {"forward": 1.0, "backward": 2.5}[pass_name]
