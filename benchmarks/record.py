"""Result files: what was measured, on what, at which commit."""

import datetime
import functools
import json
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def default_device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _cpu_name()


def device_slug(device):
    """Folder of a device's results: "nvidia-h200"; every CPU shares "cpu"."""
    if device.type == "cpu":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def results_dir(device):
    return RESULTS / device_slug(device)


@functools.cache
def metadata(device):
    """What identifies a measurement. Ask early: a device that is lost later could not answer."""
    is_cuda = device.type == "cuda"
    commit, dirty = _commit()
    return {
        "commit": commit,
        "dirty": dirty,
        "gpu": device_name(device) if is_cuda else None,
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "driver": _driver() if is_cuda else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if is_cuda else None,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def write_results(name, device, payload, folder=None):
    """Write {metadata, **payload} to NAME.json in the device's folder (or `folder`); return the path."""
    path = Path(folder or results_dir(device)) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(metadata(device) | payload, indent=1) + "\n")
    return path


def load_results(name, folder):
    """The content of NAME.json, or None where it was not measured."""
    path = Path(folder) / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def split_rows(rows):
    """(rows with a time, rows without one): a failure is kept, and never mistaken for a number."""
    timed, failed = [], []
    for row in rows:
        if row["ms"] is None:
            failed.append({key: value for key, value in row.items() if value is not None})
        else:
            timed.append({key: value for key, value in row.items() if key != "error"})
    return timed, failed


def add_output_option(parser):
    parser.add_argument("--output-dir", type=Path, help="folder for the results (default: benchmarks/results/<device>)")


def _output_of(*command):
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _commit():
    """(commit, whether tracked sources differ from it). An exported tree names it in FLASH_EXT_COMMIT."""
    if "FLASH_EXT_COMMIT" in os.environ:
        return os.environ["FLASH_EXT_COMMIT"], None
    commit = _output_of("git", "rev-parse", "HEAD")
    if not commit:
        return "unknown", None
    changes = _output_of("git", "status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results")
    return commit, bool(changes)


def _driver():
    text = _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return text.splitlines()[0].strip() if text else "unknown"


def _cpu_name():
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
