"""What this machine can build with: GPUs, nvcc, architectures, jobs. What is missing becomes a message
with the command that helps."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

NVCC_FLAGS = (
    "-O3",
    "-std=c++17",
    "-lineinfo",
    "--expt-relaxed-constexpr",
    "-Xptxas=-v,-warn-spills",
)
OLDEST_GPU = (8, 0)


class BuildError(Exception):
    """The build cannot go on; the text says why and which command helps."""


@dataclass(frozen=True)
class Gpus:
    """The NVIDIA GPUs of this machine. Present without capabilities: seen, but not to be asked."""

    present: bool
    capabilities: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Toolkit:
    home: Path
    version: str  # nvcc's, "13.0"

    @property
    def nvcc(self):
        return self.home / "bin" / "nvcc"

    def runtime_library(self):
        """libcudart; pip's wheels have it without the development link libcudart.so."""
        for folder in ("lib64", "lib"):
            for library in sorted((self.home / folder).glob("libcudart.so*")):
                return library
        raise BuildError(
            f"{self.home} has nvcc but no libcudart.so. Run:\n"
            f'    {sys.executable} -m pip install "nvidia-cuda-runtime=={self.version}.*"'
        )


def _output_of(*command):
    """Standard output and error of a command, or '' where it cannot run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout + done.stderr


def find_gpus():
    listed = _output_of("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    capabilities = sorted({(int(a), int(b)) for a, b in re.findall(r"^(\d+)\.(\d+)$", listed, re.M)})
    devices = any(Path("/dev").glob("nvidia[0-9]*"))  # a container may have GPUs and no nvidia-smi
    return Gpus(bool(capabilities) or devices, tuple(capabilities))


# ---- nvcc -------------------------------------------------------------------------------------------


def _toolkit_at(home):
    release = re.search(r"release (\d+\.\d+)", _output_of(str(home / "bin" / "nvcc"), "--version"))
    return Toolkit(home, release[1]) if release else None


def _home_of_nvcc_on_path():
    """nvcc on PATH may be a link or a script elsewhere; nvcc itself knows where it lives."""
    nvcc = shutil.which("nvcc")
    top = nvcc and re.search(r"^#\$ TOP=(.*)$", _output_of(nvcc, "--dryrun", "-E", "none.cu"), re.M)
    return Path(top[1].strip()).resolve() if top else None


def _homes_of_nvcc_wheels():
    nvidia = importlib.util.find_spec("nvidia")
    for site in nvidia.submodule_search_locations if nvidia else ():
        yield from sorted(Path(site).glob("cu[0-9]*"), reverse=True)


def find_toolkits(environ):
    """The CUDA toolkits on this machine: CUDA_HOME alone where it is set, else PATH, default, wheels."""
    named = environ.get("CUDA_HOME") or environ.get("CUDA_PATH")
    if named:
        toolkit = _toolkit_at(Path(named))
        if toolkit is None:
            raise BuildError(f"CUDA_HOME is {named}, where no bin/nvcc runs. Correct or unset it.")
        return [toolkit]
    homes = [_home_of_nvcc_on_path(), Path("/usr/local/cuda").resolve(), *_homes_of_nvcc_wheels()]
    found = (_toolkit_at(home) for home in dict.fromkeys(homes) if home)
    return [toolkit for toolkit in found if toolkit]


def nvcc_wheels(cuda_version):
    """The requirements that give pip users a working nvcc of this CUDA release (13 or later)."""
    release = ".".join(cuda_version.split(".")[:2])
    names = ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-cccl", "nvidia-cuda-runtime")
    return [f"{name}=={release}.*" for name in names]


def _how_to_get_nvcc(cuda_version):
    if int(cuda_version.split(".")[0]) < 13:
        return f"Install the CUDA toolkit {cuda_version} and set CUDA_HOME to its folder."
    quoted = " ".join(f'"{wheel}"' for wheel in nvcc_wheels(cuda_version))
    return f"Run:\n    {sys.executable} -m pip install {quoted}"


CPU_ONLY_ON_REQUEST = "For a CPU-only build, which will not use the GPU, set FLASH_EXT_CPU_ONLY=1."


def choose_toolkit(torch_version, torch_cuda, gpus, toolkits, environ):
    """Return the toolkit to build the CUDA kernels with, or None for a CPU-only build."""
    if environ.get("FLASH_EXT_CPU_ONLY") == "1":
        return None
    if torch_cuda is None:
        if gpus.present:
            raise BuildError(
                f"this machine has an NVIDIA GPU, but torch {torch_version} is a CPU-only build. Run:\n"
                f"    {sys.executable} -m pip install --force-reinstall torch "
                f"--index-url https://download.pytorch.org/whl/cu130\n{CPU_ONLY_ON_REQUEST}"
            )
        return None
    if gpus.capabilities and max(gpus.capabilities) < OLDEST_GPU:
        newest = ".".join(map(str, max(gpus.capabilities)))
        raise BuildError(
            f"the GPU of this machine has compute capability {newest}; the kernels need 8.0 (Ampere) or "
            f"later. {CPU_ONLY_ON_REQUEST}"
        )
    major = torch_cuda.split(".")[0]
    for toolkit in toolkits:
        if toolkit.version.split(".")[0] == major:
            return toolkit
    if toolkits:
        found = ", ".join(f"{toolkit.version} in {toolkit.home}" for toolkit in toolkits)
        raise BuildError(
            f"torch {torch_version} uses CUDA {torch_cuda} and needs nvcc {major}.x, got {found}. "
            f"{_how_to_get_nvcc(torch_cuda)}\n(and unset CUDA_HOME if it is set)"
        )
    if gpus.present:
        raise BuildError(
            f"this machine has an NVIDIA GPU, but no nvcc was found (CUDA_HOME, PATH, /usr/local/cuda, "
            f"pip's wheels). {_how_to_get_nvcc(torch_cuda)}\n{CPU_ONLY_ON_REQUEST}"
        )
    return None


# ---- architectures ----------------------------------------------------------------------------------


def architectures(gpus, environ):
    """What to compile for, in nvcc's names: sm_80 is machine code, compute_80 is PTX.

    TORCH_CUDA_ARCH_LIST decides where it is set. Default: the GPUs present, else 8.0 and 9.0; and always
    PTX of 8.0, which the driver compiles for any later card. 9.0 is read as 9.0a.
    """
    named = environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").replace(",", " ").split()
    for arch in named:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch) or int(arch.split(".")[0]) < OLDEST_GPU[0]:
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST must hold 8.0 or later, like 8.0, 9.0a or 8.0+PTX, got {arch!r}"
            )
    present = [f"{major}.{minor}" for major, minor in gpus.capabilities if (major, minor) >= OLDEST_GPU]
    codes = []
    for arch in named or present or ["8.0", "9.0"]:
        number = arch.removesuffix("+PTX").replace(".", "")
        number = "90a" if number == "90" else number
        codes += [f"sm_{number}", f"compute_{number}"] if arch.endswith("+PTX") else [f"sm_{number}"]
    return codes if named else [*codes, "compute_80"]


def gencode_flags(codes):
    return [f"-gencode=arch=compute_{code.split('_')[1]},code={code}" for code in codes]


# ---- jobs -------------------------------------------------------------------------------------------

# The hungriest job, measured: 964 MiB for g++ 12 on csrc/autograd.cpp with torch 2.11. nvcc 13.0 takes
# 219 MiB at most over all kernel instances.
JOB_MEMORY_BYTES = 1 << 30


def _first_number(*paths):
    """The first number in the first of these files that starts with one, or None."""
    for path in paths:
        try:
            return int(Path(path).read_text().split()[0])
        except (OSError, ValueError, IndexError):
            continue
    return None


def _cpus():
    cpus = len(os.sched_getaffinity(0))
    try:
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
    except (OSError, ValueError):  # no cgroup v2, or "max"
        return cpus
    return min(cpus, max(1, quota // period))


def _free_memory():
    available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    free = int(available[1]) * 1024
    limit = _first_number("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
    used = _first_number("/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory/memory.usage_in_bytes")
    return min(free, limit - used) if limit is not None and used is not None else free


def default_jobs():
    """As many jobs as CPUs and memory, of this container if it is one, can carry."""
    return max(1, min(_cpus(), _free_memory() // JOB_MEMORY_BYTES))
