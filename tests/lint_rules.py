"""The rules of this repository that no other linter knows (`make lint`):

    file-length      no source file is longer than 400 lines
    include-order    includes point one way: ptx <- common <- sm80, sm90 <- the variants; no variant
                     includes another
    torch-free       kernels know nothing of torch
    dead-code        no code in comments
    machine-path     no path of somebody's machine
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES = 400
CXX = {".h", ".cuh", ".cpp", ".cu"}
SOURCES = CXX | {".py", ".toml", ".md", ".sh", ""}

VARIANTS = {"v1", "v2", "v3", "backward", "decode"}
BLOCKS = {"sm80", "sm90"}
# Folder of csrc -> the other folders its files may include. Headers of csrc itself serve all.
MAY_INCLUDE = {
    "ptx": set(),
    "common": {"ptx"},
    **{block: {"common", "ptx"} for block in BLOCKS},
    **{variant: {"common", "ptx", *BLOCKS} for variant in VARIANTS},
    "cpu": {"common"},
}
TORCH_FREE = {"common", "ptx", *BLOCKS, *VARIANTS}
TORCH_INCLUDE = re.compile(r'#include\s*[<"](torch|ATen|c10|pybind11)/')
PROJECT_INCLUDE = re.compile(r'#include\s*"(\w+)/')
# A comment that is an assignment, a call or a control statement and nothing more.
COMMENTED_CODE = {
    ".py": re.compile(r"^\s*#\s*([\w.\[\]]+ = \S.*|[\w.]+\(.*\)|import [\w.]+|(if|for|while|def) .*:)$"),
    **dict.fromkeys(
        CXX, re.compile(r"^\s*//\s*(([\w:<>*&\[\].]+ ){1,3}[-+*/]?= .*;|[\w.:<>, -]+\(.*\);|return .*;|[{}])$")
    ),
}
MACHINE_PATH = re.compile(r"(?<![\w.])/(work|root|home|tmp|Users|mnt)/")


def violations(path, text):
    """Yield "rule: message" for each broken rule in the file `path` (relative to the root)."""
    lines = text.splitlines()
    if path.suffix in CXX | {".py"} and len(lines) > MAX_LINES:
        yield f"file-length: {len(lines)} lines, at most {MAX_LINES}"
    folder = path.parts[1] if path.parts[0] == "csrc" and len(path.parts) > 2 else None
    for number, line in enumerate(lines, start=1):
        included = PROJECT_INCLUDE.match(line)
        if folder and included and included[1] not in MAY_INCLUDE[folder] | {folder}:
            yield f"include-order: line {number}: {folder} must not include {included[1]}"
        if folder in TORCH_FREE and TORCH_INCLUDE.match(line):
            yield f"torch-free: line {number}: {line.strip()}"
        if path.suffix in COMMENTED_CODE and COMMENTED_CODE[path.suffix].match(line):
            yield f"dead-code: line {number}: {line.strip()}"
        if MACHINE_PATH.search(line):
            yield f"machine-path: line {number}: {line.strip()}"


def main():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    paths = [Path(name) for name in tracked if Path(name).suffix in SOURCES and name != "tests/lint_rules.py"]
    found = [f"{path}: {broken}" for path in paths for broken in violations(path, (ROOT / path).read_text())]
    print("\n".join(found) or f"{len(paths)} files keep the project's rules")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
