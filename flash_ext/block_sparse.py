"""FlexAttention's BlockMask as the arguments block_mask and block_size of `flash_attention`."""

import torch

_SIZES = (64, 128, 256)


def block_mask_from_flex(flex_mask, *, ignore_mask_mod=False):
    """Return ``{"block_mask": ..., "block_size": ...}`` of a torch.nn.attention.flex_attention.BlockMask.

        flash_attention(q, k, v, **block_mask_from_flex(flex_mask))

    Blocks that `flex_mask` holds in part, where its mask_mod decides on each score, cannot be said in whole
    blocks: they raise, unless `ignore_mask_mod` says that the mask_mod is given to `flash_attention` in other
    words (causal, window, seqlens_k, attn_mask).
    """
    partial = _dense(flex_mask.kv_num_blocks, flex_mask.kv_indices)
    full = torch.zeros_like(partial)
    if flex_mask.full_kv_num_blocks is not None:
        full = _dense(flex_mask.full_kv_num_blocks, flex_mask.full_kv_indices)
    if not ignore_mask_mod and partial.any() and not _is_noop(flex_mask.mask_mod):
        raise ValueError(
            "flash_ext.block_mask_from_flex: flex_mask must have whole blocks only, or ignore_mask_mod=True "
            f"with its mask_mod given in other words, got {int(partial.sum())} partial blocks"
        )
    rows, columns = (int(size) for size in flex_mask.BLOCK_SIZE)
    size = min(rows, columns)
    if rows not in _SIZES or columns not in _SIZES:
        raise ValueError(
            f"flash_ext.block_mask_from_flex: flex_mask must have block sizes of {_SIZES}, got {(rows, columns)}"
        )
    blocks = (partial | full).repeat_interleave(rows // size, -2).repeat_interleave(columns // size, -1)
    counts = [-(-int(seqlen) // size) for seqlen in flex_mask.seq_lengths]
    return {"block_mask": blocks[..., : counts[0], : counts[1]], "block_size": size}


def _dense(num_blocks, indices):
    """The first num_blocks[..., row] of indices[..., row, :] are on."""
    columns = indices.shape[-1]
    is_listed = torch.arange(columns, device=indices.device) < num_blocks[..., None]
    dense = torch.zeros(*indices.shape[:-1], columns + 1, dtype=torch.bool, device=indices.device)
    dense.scatter_(-1, torch.where(is_listed, indices, columns).long(), True)
    return dense[..., :columns]


def _is_noop(mask_mod):
    from torch.nn.attention.flex_attention import noop_mask

    return mask_mod is noop_mask
