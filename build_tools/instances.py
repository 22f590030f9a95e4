"""The table of kernel instances. Each (kernel, dtype, head_dim) is one small generated translation unit;
the same table reaches the dispatcher (csrc/dispatch.h) as macros, so that the two cannot disagree.

A developer's build of one instance: FLASH_EXT_HEAD_DIMS=128 FLASH_EXT_DTYPES=bf16 make build
"""

from dataclasses import dataclass

from build_tools.toolchain import BuildError

# Slowest to compile first, so that the last jobs of a build are short ones.
KERNELS = ("backward", "general_backward", "forward_v2", "general_forward", "forward_v1")
DTYPES = {"fp32": "float", "bf16": "__nv_bfloat16", "fp16": "__half"}
HEAD_DIMS = (64, 128, 256)

# On wgmma: sm_90a and 16-bit types only. For each head dimension of the other kernels, their own.
HEAD_DIMS_SM90 = {
    "backward_v3": {64: (64,), 128: (128,), 256: (256,)},
    "forward_v3": {64: (64,), 128: (96, 128), 256: (192, 256)},
    "general_backward_v3": {64: (64,), 128: (128,), 256: ()},
    "general_forward_v3": {64: (64,), 128: (128,), 256: ()},
}
DTYPES_SM90 = ("bf16", "fp16")

_HEADERS = {
    "backward": "backward/launch.cuh",
    "forward_v1": "v1/launch.cuh",
    "forward_v2": "v2/launch.cuh",
    "forward_v3": "v3/forward/launch.cuh",
    "backward_v3": "v3/backward/launch.cuh",
    "general_forward": "v2/general_launch.cuh",
    "general_forward_v3": "v3/forward/general_launch.cuh",
    "general_backward": "backward/general/launch.cuh",
    "general_backward_v3": "v3/backward/general_launch.cuh",
}


@dataclass(frozen=True)
class Selection:
    """The dtypes and head dimensions of one build, and whether it serves sm_90a."""

    dtypes: tuple[str, ...] = tuple(DTYPES)
    head_dims: tuple[int, ...] = HEAD_DIMS
    has_sm90: bool = False

    @classmethod
    def from_environment(cls, environ, codes):
        dtypes = _chosen(environ, "FLASH_EXT_DTYPES", tuple(DTYPES))
        head_dims = _chosen(environ, "FLASH_EXT_HEAD_DIMS", tuple(map(str, HEAD_DIMS)))
        return cls(dtypes, tuple(sorted(map(int, head_dims))), "sm_90a" in codes)

    def families(self):
        """(prefix of the macros, kernels, dtypes, head dimensions) of the kernels of one kind."""
        yield "FLASH_EXT", KERNELS, self.dtypes, self.head_dims
        dtypes = tuple(dtype for dtype in self.dtypes if dtype in DTYPES_SM90)
        if self.has_sm90 and dtypes:
            for kernel, own in HEAD_DIMS_SM90.items():
                head_dims = tuple(d for head_dim in self.head_dims for d in own[head_dim])
                if not head_dims:
                    continue
                yield f"FLASH_EXT_{kernel.upper()}", (kernel,), dtypes, head_dims

    def kernels(self):
        return [kernel for _, kernels, _, _ in self.families() for kernel in kernels]

    def macros(self):
        for prefix, _, dtypes, head_dims in self.families():
            yield f"{prefix}_ELEMENTS", ",".join(DTYPES[dtype] for dtype in dtypes)
            yield f"{prefix}_HEAD_DIMS", ",".join(map(str, head_dims))

    def sources(self):
        """File name -> text of every instance."""
        return {
            f"{kernel}_{dtype}_hdim{head_dim}.cu": _source(kernel, DTYPES[dtype], head_dim)
            for _, kernels, dtypes, head_dims in self.families()
            for kernel in kernels
            for head_dim in sorted(head_dims, reverse=True)
            for dtype in dtypes
        }


def _chosen(environ, variable, allowed):
    """The values that `variable` names, in the table's order; all of them where it is not set."""
    if not environ.get(variable):
        return allowed
    wanted = environ[variable].replace(",", " ").split()
    for value in wanted:
        if value not in allowed:
            raise BuildError(f"{variable} may name {', '.join(allowed)}, got {value!r}")
    return tuple(value for value in allowed if value in wanted)


def _source(kernel, element, head_dim):
    is_backward = "backward" in kernel
    params = "BackwardParams" if is_backward else "ForwardParams"
    arguments = f"<{element}, {head_dim}>(\n    const flash_ext::{params}&"
    launch = f"template void flash_ext::launch_{kernel}{arguments}, flash_ext::CudaStream);\n"
    plan = f"template flash_ext::KernelPlan flash_ext::plan_{kernel}{arguments});\n"
    return f'#include "{_HEADERS[kernel]}"\n\n{launch}' + ("" if is_backward else plan)


def write_if_changed(path, text):
    """Leave an unchanged file's time alone: ninja then has nothing to do."""
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def write_sources(selection, folder):
    """Write the selected instances into `folder` and return their paths, slowest first."""
    for name, text in selection.sources().items():
        write_if_changed(folder / name, text)
    return [folder / name for name in selection.sources()]
