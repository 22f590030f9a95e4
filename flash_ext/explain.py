"""Which kernels a call would run, and what it would cost."""

from dataclasses import dataclass

import torch

from flash_ext import cost
from flash_ext.extension import _C
from flash_ext.interface import GENERAL_ARGUMENTS, as_4d, causal_mode


@dataclass(frozen=True)
class Explanation:
    """The kernel that a forward call runs. Sizes in bytes; zero where a device has no such thing."""

    device: str
    algorithm: str
    # Whose kernels compute its gradients: "v2" (which v1 shares, and calls with a gradient of slopes) or "v3".
    backward: str
    reasons: tuple[str, ...]
    block_m: int  # query rows of a tile
    block_n: int  # keys of a tile
    num_warps: int
    shared_memory_bytes: int
    num_thread_blocks: int
    flops: int  # of both matrix products, over visible scores
    hbm_bytes: int  # a model: what the algorithm asks of device memory, had it no cache in front
    workspace_bytes: int

    def __str__(self):
        lines = [
            f"{self.algorithm} forward kernel on {self.device}",
            *(f"  why            {reason}" for reason in self.reasons),
            f"  gradients      {self.backward} backward kernels",
            f"  tile           {self.block_m} query rows x {self.block_n} keys",
        ]
        if self.num_warps:
            lines += [
                f"  warps          {self.num_warps} in each of {self.num_thread_blocks:,} thread blocks",
                f"  shared memory  {self.shared_memory_bytes:,} bytes per thread block",
            ]
        lines += [
            f"  FLOPs          {self.flops:,}",
            f"  memory traffic {self.hbm_bytes:,} bytes (model without a cache)",
            f"  workspace      {self.workspace_bytes:,} bytes",
        ]
        return "\n".join(lines)


def explain(q, k, v, *, causal=False, scale=None, algorithm="auto", **general):
    """Return an `Explanation` of ``flash_attention(q, k, v, ...)``, without running its kernel.

    Takes the arguments of `flash_attention`, checks them by the same rules, and raises as it does. `general`
    are those beyond plain attention. Of these FLOPs know the window, and memory traffic knows none; packed
    sequences are not explained.
    """
    given = [name for name in GENERAL_ARGUMENTS if _is_given(general.get(name))]
    if given:
        _check_general(q, k, v, causal_mode(causal), scale, algorithm, general)
    mode = causal_mode(causal)
    if q.dim() == 3:
        q, k, v = q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.device != q.device or x.device.type not in ("cpu", "cuda"):
            where = "the CPU or a CUDA device" if name == "q" else f"{q.device} like q"
            raise RuntimeError(f"flash_ext.explain: {name} must be on {where}, got {x.device}")
    # The Meta kernel applies every other rule.
    on_meta = (torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") for x in (q, k, v))
    torch.ops.flash_ext.forward(*on_meta, scale, mode, algorithm)

    batch, heads, seqlen_q, head_dim = q.shape
    heads_kv, seqlen_k = k.shape[1], k.shape[2]
    shape = (batch, heads, seqlen_q, seqlen_k, head_dim)
    window = general.get("window") or (-1, -1)
    plan = _C.plan_forward(
        device=str(q.device),
        algorithm=algorithm,
        dtype=str(q.dtype).removeprefix("torch."),
        batch=batch,
        heads_q=heads,
        heads_kv=heads_kv,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        head_dim=head_dim,
        causal=mode,
        is_aligned=[_is_aligned(x) for x in (q, k, v)],
        scale=head_dim**-0.5 if scale is None else scale,
        window=window,
        softcap=general.get("softcap") or 0.0,
        block_size=general.get("block_size", 128),
        given=given,
        **_mask_facts(general.get("attn_mask")),
    )
    v3_refusal = plan.pop("v3_refusal")
    if plan["algorithm"] == "v1":
        traffic = cost.forward_v1_traffic(*shape, q.element_size(), plan["block_n"], mode)
    else:
        traffic = cost.forward_q_outer_traffic(*shape, q.element_size(), plan["block_m"], mode)
    return Explanation(
        device=str(q.device),
        reasons=tuple(_reasons(q, k, v, algorithm, plan["algorithm"], v3_refusal)),
        flops=cost.forward_flops(*shape, mode, window),
        hbm_bytes=sum(traffic),
        **plan,
    )


def _check_general(q, k, v, mode, scale, algorithm, general):
    if "cu_seqlens_q" in general or "cu_seqlens_k" in general:
        raise ValueError("flash_ext.explain: cu_seqlens_q must not be given, got packed sequences")
    if q.dim() == 3:
        q, k, v = q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)
    if general.get("attn_mask") is not None:
        general["attn_mask"] = as_4d(general["attn_mask"], has_heads=True)
    if general.get("dropout_p"):
        general.setdefault("rng_state", torch.zeros(2, dtype=torch.int64, device=q.device))
    general = {name: x for name, x in general.items() if x is not None}
    for name, x in general.items():
        if isinstance(x, torch.Tensor) and x.device != q.device:
            raise RuntimeError(f"flash_ext.explain: {name} must be on {q.device} like q, got {x.device}")
    on_meta = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in general.items()}
    qkv = (x.to("meta") for x in (q, k, v))
    torch.ops.flash_ext.general_forward(*qkv, scale=scale, causal=mode, algorithm=algorithm, **on_meta)


def _is_given(value):
    return isinstance(value, torch.Tensor) or bool(value)


def _reasons(q, k, v, asked, taken, v3_refusal):
    if asked == "auto":
        yield f"algorithm='auto' takes {taken}, the fastest that can run this call"
    else:
        yield f"algorithm='{asked}' was asked for"
    if v3_refusal:
        yield f"v3 {v3_refusal}"
    elif asked == "auto" and taken == "v2":
        yield "v3 is slower for one head of at most 64 with up to 1024 queries and less than 2048 keys"
    if not q.is_cuda:
        return
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not _is_aligned(x):
            yield f"{name} has rows that are not aligned to 16 bytes: loaded by elements, which is slower"


def _mask_facts(mask):
    """For a mask of four dimensions."""
    if mask is None:
        return {"mask_dtype": "", "mask_strides": [0] * 4, "mask_is_aligned": True}
    return {
        "mask_dtype": str(mask.dtype).removeprefix("torch."),
        "mask_strides": [0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True)],
        "mask_is_aligned": mask.data_ptr() % 16 == 0,
    }


def _is_aligned(x):
    strides = (stride for stride, size in zip(x.stride()[:-1], x.shape, strict=False) if size > 1)
    return x.data_ptr() % 16 == 0 and all(stride * x.element_size() % 16 == 0 for stride in strides)
