"""Bytes that naive attention, v1, v2 and v3 move through device memory, by the profiler's counters.

Nsight Compute runs this module again for each implementation and counts dram__bytes_read and
dram__bytes_write of every kernel between two marker kernels. Caches are not flushed between the kernels
of a call: what one leaves in L2 the next may find, as in real use. Before a call a buffer larger
than L2 is read, so that it starts with nothing cached, and again after it: bytes still dirty in L2 are
written back then, and are added to the call's.
"""

import argparse
import csv
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import flash_ext
from benchmarks import baselines, io_model, record, tables
from benchmarks.baselines import BASELINES
from benchmarks.cases import AttentionCase
from benchmarks.plots import plot_traffic

NAMES = ("naive", "flash_ext_v1", "flash_ext_v2", "flash_ext_v3")
SEQLENS = (1024, 2048, 4096, 8192)
# 32,768 tokens of 16 heads of 64 in fp16: 64 MiB a tensor at every length, more than the L2 cache.
TOKENS, HEADS, HEAD_DIM = 32768, 16, 64
FLUSH_BYTES = 512 << 20
READ, WRITE = "dram__bytes_read.sum", "dram__bytes_write.sum"
# torch.cuda._sleep launches a kernel that nothing else uses: it marks the borders of a call.
MARKER = "spin_kernel"
CHILD_SECONDS = 240


def traffic_cases():
    return [AttentionCase(TOKENS // n, HEADS, n, HEAD_DIM, "fp16") for n in SEQLENS]


def run_child(name):
    """Under the profiler: per case, marker, the call, marker, flush."""
    device = torch.device("cuda")
    flush = torch.zeros(FLUSH_BYTES // 4, device=device)
    run = BASELINES[name].run
    for case in traffic_cases():
        q, k, v, _ = case.make_inputs(device)
        with torch.no_grad():
            run(q, k, v, case.causal)
            flush.sum()
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            torch.cuda._sleep(1)
            out = run(q, k, v, case.causal)
            torch.cuda._sleep(1)
            flush.sum()
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
        del q, k, v, out


def find_profiler():
    candidates = [shutil.which("ncu")]
    for root in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        candidates += [shutil.which("ncu", path=f"{root}/bin")] if root else []
    candidates += sorted(str(path) for path in Path("/opt/nvidia/nsight-compute").glob("*/ncu"))
    return next((path for path in candidates if path), None)


def profile(name, profiler):
    """(list of (read, written) per case, None), or (None, why not)."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "counters.csv"
        command = [
            *(profiler, "--clock-control", "none", "--cache-control", "none", "--profile-from-start", "off"),
            *("--metrics", f"{READ},{WRITE}", "--csv", "--page", "raw", "--print-units", "base"),
            *("--log-file", str(log), sys.executable, "-m", "benchmarks.hbm_traffic", "--child", name),
        ]
        try:
            done = subprocess.run(command, cwd=record.ROOT, capture_output=True, text=True, timeout=CHILD_SECONDS)
        except (OSError, subprocess.TimeoutExpired) as error:
            return None, f"{type(error).__name__}: {error}"
        text = log.read_text() if log.exists() else ""
        kernels = parse_counters(text)
        if done.returncode != 0 or not kernels:
            reasons = [line for line in (text + done.stderr).splitlines() if "error" in line.lower()]
            reason = reasons[-1].strip() if reasons else "no counters"
            return None, f"profiler exit {done.returncode}: {reason}"
    calls = split_calls(kernels)
    if len(calls) != len(SEQLENS):
        return None, f"expected {len(SEQLENS)} calls between markers, found {len(calls)}"
    return calls, None


def parse_counters(text):
    """List of (kernel name, bytes read, bytes written) from the profiler's raw CSV page."""
    lines = text.splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if first is None:
        return []
    kernels = []
    for row in csv.DictReader(lines[first:]):
        if row.get("ID", "").isdigit():  # the line below the header holds units
            kernels.append((row["Kernel Name"], _number(row[READ]), _number(row[WRITE])))
    return kernels


def _number(text):
    return float(text.replace(",", ""))


def split_calls(kernels):
    """(read, written) of each call: its kernels, plus what the flush after it writes back."""
    calls, inside = [], False
    for name, read, written in kernels:
        if MARKER in name:
            inside = not inside
            if inside:
                calls.append([0.0, 0.0])
        elif calls:
            calls[-1][0] += read if inside else 0.0
            calls[-1][1] += written
    return [tuple(call) for call in calls]


def model_bytes(name, case):
    if name == "naive":
        return io_model.naive_bytes(case)
    q, k, v, _ = case.make_inputs("cuda")
    plan = flash_ext.explain(q, k, v, algorithm=name.removeprefix("flash_ext_"))
    if name == "flash_ext_v1":
        return io_model.v1_bytes(case, plan.block_n)
    return io_model.q_outer_bytes(case, plan.block_m)


def measure(profiler, device):
    """(rows, {implementation: why it has no measured bytes})."""
    rows, not_run = [], {}
    for name in NAMES:
        if BASELINES[name].refusal(traffic_cases()[0], "forward", device):
            continue
        calls, reason = profile(name, profiler) if profiler else (None, "Nsight Compute (ncu) was not found")
        if reason:
            not_run[name] = f"not run: {reason}"
        for i, case in enumerate(traffic_cases()):
            read, written = calls[i] if calls else (None, None)
            model_read, model_written = model_bytes(name, case)
            least_read, least_written = io_model.compulsory_bytes(case)
            rows.append(
                case.record()
                | {"impl": name, "read_bytes": read, "write_bytes": written}
                | {"model_read_bytes": model_read, "model_write_bytes": model_written}
                | {"compulsory_read_bytes": least_read, "compulsory_write_bytes": least_written}
            )
    return rows, not_run


def report(screen, rows, not_run):
    screen.print(f"{'seqlen':>7}  {'':<14}{'read':>12}{'model':>12}{'written':>12}{'model':>12}")
    for row in sorted(rows, key=lambda row: (row["seqlen"], NAMES.index(row["impl"]))):
        columns = ("read_bytes", "model_read_bytes", "write_bytes", "model_write_bytes")
        cells = "".join(f"{tables.format_bytes(row[column]):>12}" for column in columns)
        screen.print(f"{row['seqlen']:>7}  {tables.LABELS[row['impl']]:<14}{cells}", highlight=False)
    for name, reason in not_run.items():
        screen.print(f"{tables.LABELS[name]}: {reason}", markup=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", choices=NAMES, help=argparse.SUPPRESS)
    record.add_output_option(parser)
    options = parser.parse_args()
    baselines.use_full_fp32()
    if options.child:
        run_child(options.child)
        return 0
    device, screen = record.default_device(), tables.console()
    if device.type != "cuda":
        screen.print("There is no device memory to measure here.")
        return 1
    rows, not_run = measure(find_profiler(), device)
    report(screen, rows, not_run)
    path = record.write_results("hbm_traffic", device, {"rows": rows, "not_run": not_run}, options.output_dir)
    picture = plot_traffic(
        rows,
        path.with_suffix(".png"),
        "Device-memory traffic of one forward call",
        f"{record.device_name(device)}; fp16, head_dim {HEAD_DIM}, {TOKENS:,} tokens x {HEADS} heads;"
        " dashed: IO model, as if nothing were cached",
    )
    screen.print(f"\nresults: {path}\nplot:    {picture}", highlight=False)
    return 1 if not_run else 0


if __name__ == "__main__":
    sys.exit(main())
