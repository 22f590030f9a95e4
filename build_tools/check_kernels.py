"""Compiles every kernel instance with nvcc alone and fails on what ptxas should not say.

    python -m build_tools.check_kernels         (make kernels; no GPU and no CUDA build of torch needed)

It fails on register spills that are not listed below, and on warnings that ptxas serialised or ignored
asynchronous instructions (C7508, C7510 to C7519). Prints registers, spills and compile time of each.
"""

import os
import re
import resource
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from build_tools import instances, toolchain

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "build" / "kernels"


class Accepted(NamedTuple):
    """A spill that we ship: the most bytes any kernel of an instance may spill, and its measured cost."""

    spilled: int
    cost: str


# Costs were measured on an H200 (sm_90a), as time of the shipped kernel over the best one without spills.
_KV_128 = "tiles of 64x64, for GPUs with less shared memory, spill; not measured where they run"
_KV_64 = "three thread blocks a multiprocessor spill; two do not and take 1.03 times as long (4x32x4096 bf16)"
_V3_128 = (
    "the producer and the ends of tiles spill, no step does; with V in registers for 3 steps of dP instead of 5"
    " nothing spills, and it takes 1.03 times as long (1x16x16384 bf16)"
)
_SM80 = "not measured on this architecture, whose ptxas allocates a little differently; none on sm_90a"
_GENERAL_FP32 = (
    "dQ of general attention in fp32, 64 B more than with Philox's products in two instructions each; not measured "
    "against either, or a smaller tile without spills"
)
_GENERAL_V3_Q = (
    "the producer: who loads Q, once a tile, and who walks a block_mask; at head_dim 128 with a mask and dropout also "
    "the ends of tiles and, of a bool mask, two loads a block; not measured without"
)
_V3_GENERAL = (
    "the producer, which finds steps ahead of time, and the ends of tiles spill; of steps those under a softcap at "
    "head_dim 64, one register; not measured"
)

# By (instance, architecture).
ACCEPTED_SPILLS: dict[tuple[str, str], Accepted] = {
    ("forward_v2_fp16_hdim128", "sm_80"): Accepted(24, _SM80),
    ("forward_v2_bf16_hdim128", "sm_80"): Accepted(24, _SM80),
    ("forward_v2_fp16_hdim64", "sm_80"): Accepted(32, _SM80),
    ("forward_v2_bf16_hdim64", "sm_80"): Accepted(32, _SM80),
    ("backward_fp16_hdim64", "sm_90a"): Accepted(4, _KV_64),
    ("backward_bf16_hdim64", "sm_90a"): Accepted(4, _KV_64),
    ("backward_fp16_hdim64", "sm_80"): Accepted(52, _KV_64),
    ("backward_bf16_hdim64", "sm_80"): Accepted(52, _KV_64),
    ("general_forward_fp32_hdim256", "sm_80"): Accepted(8, _SM80),
    ("general_forward_v3_fp16_hdim64", "sm_90a"): Accepted(220, _GENERAL_V3_Q),
    ("general_forward_v3_bf16_hdim64", "sm_90a"): Accepted(220, _GENERAL_V3_Q),
    ("general_forward_v3_fp16_hdim128", "sm_90a"): Accepted(80, _GENERAL_V3_Q),
    ("general_forward_v3_bf16_hdim128", "sm_90a"): Accepted(80, _GENERAL_V3_Q),
    ("general_backward_v3_fp16_hdim128", "sm_90a"): Accepted(700, _V3_GENERAL),
    ("general_backward_v3_bf16_hdim128", "sm_90a"): Accepted(700, _V3_GENERAL),
    ("general_backward_v3_fp16_hdim64", "sm_90a"): Accepted(800, _V3_GENERAL),
    ("general_backward_v3_bf16_hdim64", "sm_90a"): Accepted(800, _V3_GENERAL),
    ("general_backward_fp32_hdim128", "sm_90a"): Accepted(116, _GENERAL_FP32),
    ("general_backward_fp32_hdim128", "sm_80"): Accepted(124, _GENERAL_FP32),
    ("backward_v3_fp16_hdim128", "sm_90a"): Accepted(84, _V3_128),
    ("backward_v3_bf16_hdim128", "sm_90a"): Accepted(84, _V3_128),
    ("backward_fp16_hdim128", "sm_90a"): Accepted(20, _KV_128),
    ("backward_bf16_hdim128", "sm_90a"): Accepted(20, _KV_128),
}

# As torch compiles extensions, so that what compiles here compiles there.
TORCH_FLAGS = (
    "-D__CUDA_NO_HALF_OPERATORS__",
    "-D__CUDA_NO_HALF_CONVERSIONS__",
    "-D__CUDA_NO_BFLOAT16_CONVERSIONS__",
    "-D__CUDA_NO_HALF2_OPERATORS__",
    "-Xcompiler=-fPIC",
)

_ENTRY = re.compile(
    r"Compiling entry function '(?P<symbol>\w+)' for '(?P<arch>\w+)'.*?"
    r"(?P<frame>\d+) bytes stack frame, (?P<spilled>\d+) bytes spill stores.*?Used (?P<registers>\d+) registers",
    re.S,
)
_FORBIDDEN = re.compile(r"^.*\(C75(?:08|1\d)\).*$", re.M)


@dataclass(frozen=True)
class Report:
    instance: str
    seconds: float
    problems: tuple[str, ...]
    lines: tuple[str, ...]


def _demangle(text):
    """C++ names for linker symbols, where binutils is there to translate them."""
    if shutil.which("c++filt") is None:
        return text
    return subprocess.run(["c++filt", "-p"], input=text, capture_output=True, text=True, check=True).stdout


def read_log(instance, log):
    """What a log of nvcc -Xptxas=-v says of `instance`: (lines to print, problems)."""
    lines, problems = [], _FORBIDDEN.findall(log)
    for entry in _ENTRY.finditer(log):
        # ptxas reports some spills as a stack frame alone.
        arch, spilled = entry["arch"], int(entry["spilled"]) or int(entry["frame"])
        accepted = ACCEPTED_SPILLS.get((instance, arch), Accepted(0, "")).spilled
        lines.append(f"{arch:8} {entry['registers']:>3} registers {spilled:5} B spilled  {entry['symbol']}")
        if spilled > accepted:
            problems.append(f"{entry['symbol']} spills {spilled} B on {arch}; accepted: {accepted}")
    return lines, problems


def compile_instance(toolkit, codes, source):
    """Compile one instance and read the log."""
    log_path = OUTPUT / f"{source.stem}.log"
    command = [
        str(toolkit.nvcc), "-c", str(source), "-o", str(log_path.with_suffix(".o")), f"-I{ROOT / 'csrc'}",
        *toolchain.NVCC_FLAGS, *TORCH_FLAGS, *toolchain.gencode_flags(codes),
    ]  # fmt: skip
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    log = done.stdout + done.stderr
    log_path.write_text(log)
    lines, problems = read_log(source.stem, log)
    if done.returncode != 0:
        problems = [f"nvcc failed:\n{log}"]
    elif not lines:
        problems = [f"nothing found in ptxas's log {log_path}"]
    return Report(source.stem, time.monotonic() - start, tuple(problems), tuple(lines))


def main():
    toolkits = toolchain.find_toolkits(os.environ)
    if not toolkits:
        raise SystemExit("no nvcc found (CUDA_HOME, PATH, /usr/local/cuda, pip's wheels); see `make help`")
    codes = toolchain.architectures(toolchain.Gpus(present=False), os.environ)
    selection = instances.Selection.from_environment(os.environ, codes)
    sources = instances.write_sources(selection, ROOT / "build" / "instances")
    OUTPUT.mkdir(parents=True, exist_ok=True)
    jobs = int(os.environ.get("MAX_JOBS") or toolchain.default_jobs())
    print(f"nvcc {toolkits[0].version}, {' '.join(codes)}, {len(sources)} instances, {jobs} jobs", flush=True)
    failed = 0
    with ThreadPoolExecutor(jobs) as pool:
        for report in pool.map(lambda source: compile_instance(toolkits[0], codes, source), sources):
            failed += bool(report.problems)
            print(f"{'FAILED' if report.problems else 'ok':6} {report.instance}  {report.seconds:.0f} s")
            details = "".join(f"       {line}\n" for line in (*report.lines, *report.problems))
            print(_demangle(details), end="", flush=True)
    # The largest process of all, in KiB: what toolchain.JOB_MEMORY_BYTES must allow for.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(f"{len(sources) - failed} of {len(sources)} instances are clean; peak memory of a job {peak >> 10} MiB")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
