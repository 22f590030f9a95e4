"""Proof on a GPU: the test suite, a memory checker, and bit repeatability; writes gpu_check.json.

Each part has a status: "passed", "failed", or "not run" with the reason (a tool that is missing or that
refuses the device has proved nothing). The exit code is 0 only if no part failed.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch

import flash_ext
from benchmarks import record, tables
from benchmarks.baselines import v3_runs_on
from benchmarks.cases import AttentionCase

REPEATS = 1000
SEED = 20
ERROR_EXIT = 86  # what compute-sanitizer returns when it found errors


def part(status, **facts):
    return {"status": status, **facts}


def run_command(command, seconds, **environment):
    """(CompletedProcess, None) or (None, why it did not run to its end)."""
    try:
        done = subprocess.run(
            command,
            cwd=record.ROOT,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
    except FileNotFoundError as error:
        return None, f"{command[0]}: {error.strerror}"
    except subprocess.TimeoutExpired:
        return None, f"no end after {seconds:.0f} s"
    return done, None


def last_lines(text, count=15):
    return text.strip().splitlines()[-count:]


def check_tests(arguments, seconds):
    """The whole suite in a process of its own, counted from its JUnit report."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *arguments]
        done, reason = run_command(command, seconds)
        if done is None:
            return part("failed", reason=reason, command=shlex.join(command[1:]))
        if not report.exists():
            return part("failed", exit_code=done.returncode, output=last_lines(done.stdout + done.stderr))
        counts, failed = read_junit(report)
    status = "passed" if done.returncode == 0 and counts["tests"] > counts["skipped"] else "failed"
    return part(status, exit_code=done.returncode, **counts, failed_tests=failed)


def read_junit(path):
    """({tests, failures, errors, skipped, seconds, skip reasons}, names of the first failed tests)."""
    root = ElementTree.parse(path).getroot()
    suites = [root] if root.tag == "testsuite" else root.findall("testsuite")
    outcomes = ("tests", "failures", "errors", "skipped")
    counts = {key: sum(int(suite.get(key, 0)) for suite in suites) for key in outcomes}
    counts["seconds"] = sum(float(suite.get("time", 0)) for suite in suites)
    reasons = {}
    for skip in root.iter("skipped"):
        reason = skip.get("message", "")
        reasons[reason] = reasons.get(reason, 0) + 1
    counts["skip_reasons"] = reasons
    failed = [
        f"{test.get('classname')}::{test.get('name')}"
        for test in root.iter("testcase")
        if test.find("failure") is not None or test.find("error") is not None
    ]
    return counts, failed[:50]


def check_memory(seconds):
    """compute-sanitizer memcheck over the sweep, and over a planted bug that it must report."""
    tool = find_sanitizer()
    if tool is None:
        return part("not run", reason="compute-sanitizer was not found")
    done, reason = sanitize(tool, seconds)
    if done is None:
        return part("not run", reason=reason)
    output = last_lines(done.stdout + done.stderr)
    if "not supported" in done.stdout + done.stderr:
        return part("not run", reason="compute-sanitizer does not support this device", output=output)
    if done.returncode != 0:
        return part("failed", exit_code=done.returncode, output=output)

    control, reason = sanitize(tool, seconds, "--plant-bug")
    if control is None or control.returncode != ERROR_EXIT:
        reason = reason or f"exit {control.returncode}"
        return part("not run", reason=f"the checker did not report a planted bug: {reason}")
    calls = next((int(line.split(":")[1]) for line in output if line.startswith("calls:")), None)
    return part("passed", tool="memcheck", calls=calls, planted_bug="reported", output=output)


def find_sanitizer():
    folders = [None, *(f"{root}/bin" for root in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if root)]
    return next(filter(None, (shutil.which("compute-sanitizer", path=folder) for folder in folders)), None)


def sanitize(tool, seconds, *arguments):
    """Run the sweep under memcheck, each tensor an allocation of its own."""
    command = [tool, "--tool", "memcheck", "--error-exitcode", str(ERROR_EXIT), "--print-limit", "5"]
    # torch probes the driver with calls that may fail by design; ours raise when they do.
    command += ["--report-api-errors", "no", sys.executable, "-m", "benchmarks.sanitizer_sweep", *arguments]
    return run_command(command, seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def check_repeatability(device, repeats):
    """Bits of out, lse, dk and dv over many runs of each case, and of dq with deterministic=True."""
    cases = repeated_cases(v3_runs_on(device))
    different, dq_differs_without_it = {}, 0
    for algorithm, case in cases:
        for deterministic in (True, False):
            counts = count_differences(algorithm, case, deterministic, device, repeats)
            if not deterministic:
                dq_differs_without_it += counts.pop("dq")
            for name, count in counts.items():
                different[name] = different.get(name, 0) + count
    labels = [f"{algorithm} {case.label()}" for algorithm, case in cases]
    facts = {"repeats": repeats, "seed": SEED, "cases": labels}
    facts |= {"different": different, "dq_different_without_deterministic": dq_differs_without_it}
    return part("failed" if any(different.values()) else "passed", **facts)


def repeated_cases(with_v3):
    """(algorithm, case). v3 gets more heads, so that a thread block takes several tiles."""
    kinds = [("v2", 4, ("fp16", "bf16", "fp32"), (64, 128))]
    if with_v3:
        kinds.append(("v3", 32, ("fp16", "bf16"), (64, 96, 128, 192, 256)))
    return [
        (algorithm, AttentionCase(2, heads, 1000, head_dim, dtype, causal))
        for algorithm, heads, dtypes, head_dims in kinds
        for dtype in dtypes
        for head_dim in head_dims
        for causal in (False, True)
    ]


def count_differences(algorithm, case, deterministic, device, repeats):
    """How many of `repeats` runs differ in any bit from a first run, for each result."""
    q, k, v, dout = case.make_inputs(device, SEED)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def run():
        options = {"causal": case.causal, "algorithm": algorithm, "deterministic": deterministic}
        out, lse = flash_ext.flash_attention(*leaves, return_lse=True, **options)
        grads = torch.autograd.grad(out, leaves, dout)
        names = ("out", "lse", "dq", "dk", "dv")
        return dict(zip(names, (out.detach(), lse.detach(), *grads), strict=True))

    first = {name: bits(x).clone() for name, x in run().items()}
    counts = {name: torch.zeros((), dtype=torch.int64, device=device) for name in first}
    for _ in range(repeats):
        for name, x in run().items():
            counts[name] += (bits(x) != first[name]).any()
    return {name: count.item() for name, count in counts.items()}


def bits(x):
    return x.contiguous().view({2: torch.int16, 4: torch.int32}[x.element_size()])


def guarded(check, *arguments):
    """A part that raises has failed; the others still run."""
    begin = time.monotonic()
    try:
        result = check(*arguments)
    except Exception as error:
        result = part("failed", reason=f"{type(error).__name__}: {error}")
    return result | {"wall_seconds": round(time.monotonic() - begin, 1)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--skip", nargs="+", choices=("tests", "memory", "repeatability"), default=[])
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--seconds", type=float, default=1200, help="limit of each outside command")
    parser.add_argument("--pytest-args", type=shlex.split, default=[], help="more arguments for pytest")
    record.add_output_option(parser)
    options = parser.parse_args()
    device, screen = record.default_device(), tables.console()
    if device.type != "cuda":
        screen.print("No GPU here: nothing to check. `make test` runs the tests that a CPU can.")
        return 1

    checks = {
        "repeatability": (check_repeatability, device, options.repeats),
        "memory": (check_memory, options.seconds),
        "tests": (check_tests, options.pytest_args, options.seconds),
    }
    parts = {}
    for name, check in checks.items():
        skipped = name in options.skip
        parts[name] = part("not run", reason="skipped by --skip") if skipped else guarded(*check)
        screen.print(f"{name}: {parts[name]}", markup=False, highlight=False)
        # Written after each part, so that an interrupted run leaves what it found.
        path = record.write_results("gpu_check", device, {"build": flash_ext.build_info(), **parts}, options.output_dir)
    screen.print(f"\nresults: {path}", highlight=False)
    return 1 if any(result["status"] == "failed" for result in parts.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
