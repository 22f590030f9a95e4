"""Loads the compiled half of the package, and says what to do when that cannot work."""

import importlib.util
import json
import sys
from pathlib import Path

import torch


def _rebuild_command():
    return f"{sys.executable} -m pip install --no-build-isolation --no-deps --force-reinstall ."


def _read_build_record():
    """What the build wrote beside the extension: versions, architectures, kernels."""
    spec = importlib.util.find_spec("flash_ext._C")
    if spec is None or spec.origin is None:
        raise ImportError(
            f"flash_ext is not built for Python {sys.version_info.major}.{sys.version_info.minor}. "
            f"Run this in the source tree of flash_ext:\n    {_rebuild_command()}"
        )
    return json.loads(Path(spec.origin).with_suffix(".build.json").read_text())


def _binary_interface(torch_version, cuda_version):
    """What must agree between the torch of the build and the torch that runs."""
    release = ".".join(torch_version.split("+")[0].split(".")[:2])
    return release, cuda_version and cuda_version.split(".")[0]


def _describe(torch_version, cuda_version):
    return f"torch {torch_version} ({f'CUDA {cuda_version}' if cuda_version else 'CPU only'})"


def check_torch_matches(record, torch_version, cuda_version):
    """Raise ImportError if an extension with this build record cannot work with the running torch.

    torch's C++ interface changes between minor versions, and a CUDA build needs the same CUDA major.
    """
    built = record["torch_version"], record["torch_cuda_version"]
    # A CPU-only extension links nothing of CUDA, so any torch of the same release serves it.
    ignore_cuda = record["cuda_version"] is None
    wanted, running = _binary_interface(*built), _binary_interface(torch_version, cuda_version)
    if wanted[0] == running[0] and (ignore_cuda or wanted[1] == running[1]):
        return
    raise ImportError(
        f"flash_ext was built with {_describe(*built)}, but {_describe(torch_version, cuda_version)} is "
        f"running. Install that torch again, or rebuild in the source tree of flash_ext:\n    "
        f"{_rebuild_command()}"
    )


BUILD_RECORD = _read_build_record()
check_torch_matches(BUILD_RECORD, torch.__version__, torch.version.cuda)

from flash_ext import _C  # noqa: E402  (loading it registers torch.ops.flash_ext.*)


def build_info():
    """Return what this build is and where it runs, as a dict.

    version, torch_version (built with), torch_running, cuda_version (nvcc's; None: CPU-only build),
    architectures, kernels, dtypes and head_dims compiled for the GPU, cpu_capability (SIMD level).
    """
    return {**BUILD_RECORD, "torch_running": torch.__version__, "cpu_capability": _C.cpu_capability()}
