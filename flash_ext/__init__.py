"""FlashAttention as hand-written CUDA C++ kernels, with a CPU path, in a PyTorch extension."""

import flash_ext.registrations  # noqa: F401  (vmap, FLOP counter)
from flash_ext.block_sparse import block_mask_from_flex
from flash_ext.explain import Explanation, explain
from flash_ext.extension import BUILD_RECORD, build_info
from flash_ext.interface import flash_attention, flash_attention_v1, flash_attention_v2, flash_attention_v3
from flash_ext.reference import attention_reference

__version__ = BUILD_RECORD["version"]

__all__ = [
    "Explanation",
    "attention_reference",
    "block_mask_from_flex",
    "build_info",
    "explain",
    "flash_attention",
    "flash_attention_v1",
    "flash_attention_v2",
    "flash_attention_v3",
]
