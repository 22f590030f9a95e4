"""FlashAttention as hand-written CUDA C++ kernels, with a CPU path, in a PyTorch extension."""

from flash_ext.extension import BUILD_RECORD, build_info  # loads the operators: must come first
from flash_ext.explain import Explanation, explain  # isort: skip
from flash_ext.interface import flash_attention, flash_attention_v1, flash_attention_v2
from flash_ext.reference import attention_reference

from flash_ext import registrations  # noqa: F401  isort: skip

__version__ = BUILD_RECORD["version"]

__all__ = [
    "Explanation",
    "attention_reference",
    "build_info",
    "explain",
    "flash_attention",
    "flash_attention_v1",
    "flash_attention_v2",
]
