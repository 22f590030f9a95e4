"""Time and memory of building the extension: all default architectures, one of them, and nothing to do.

    python -m benchmarks.build_time [--jobs 2]

Builds a copy of the sources in a temporary folder, so that the working tree's own build stays as it is.
Memory is that of the largest single process, a compiler. Writes build.json.
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import record, tables

SOURCES = ("csrc", "flash_ext", "build_tools", "setup.py", "pyproject.toml", "README.md")
BUILDS = (
    ("all architectures (8.0, 9.0a, PTX)", "8.0+PTX;9.0a"),
    ("nothing changed", "8.0+PTX;9.0a"),
    ("one architecture (9.0a)", "9.0a"),
)


def copy_sources(folder):
    for name in SOURCES:
        source = record.ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("*.so", "*.build.json", "__pycache__"))
        else:
            shutil.copy(source, folder / name)


def build_seconds(folder, architectures, jobs):
    environment = {**os.environ, "MAX_JOBS": str(jobs), "TORCH_CUDA_ARCH_LIST": architectures}
    begin = time.monotonic()
    subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=folder,
        env=environment,
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return time.monotonic() - begin


def measure(jobs):
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for what, architectures in BUILDS:
            folder = Path(temporary) / architectures.replace(";", "_")
            if not folder.exists():
                folder.mkdir()
                copy_sources(folder)
            rows.append({"build": what, "jobs": jobs, "seconds": round(build_seconds(folder, architectures, jobs), 1)})
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, help="MAX_JOBS of the builds")
    record.add_output_option(parser)
    options = parser.parse_args()
    rows = measure(options.jobs)
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    payload = {"rows": rows, "largest_process_bytes": largest}
    path = record.write_results("build", torch.device("cpu"), payload, options.output_dir)
    for row in rows:
        tables.console().print(f"{row['build']}: {row['seconds']} s with MAX_JOBS={row['jobs']}", highlight=False)
    tables.console().print(f"largest process: {largest / 2**20:.0f} MiB\nresults: {path}", highlight=False)


if __name__ == "__main__":
    main()
