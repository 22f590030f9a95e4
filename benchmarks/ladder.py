"""What each generation bought: forward TFLOP/s of naive, v1, v2, v3 and torch's own over sequence lengths.

head_dim 128 of the papers' grid, with and without a mask. Takes the rows that bench_attention recorded;
only where they are incomplete are these shapes measured again, all in one run. Writes ladder.json and a
plot of the same name.
"""

import argparse
import sys

from benchmarks import baselines, record, tables
from benchmarks.bench_attention import HIDDEN, SEQLENS, TOKENS
from benchmarks.cases import AttentionCase
from benchmarks.comparison import compare
from benchmarks.plots import plot_ladder
from benchmarks.timing import Plan

HEAD_DIM = 128
NAMES = ("naive", "flash_ext_v1", "flash_ext_v2", "flash_ext_v3", "sdpa_flash", "sdpa_cudnn")


def ladder_cases():
    return [
        AttentionCase(TOKENS // n, HIDDEN // HEAD_DIM, n, HEAD_DIM, "bf16", causal, layout="bshd")
        for causal in (False, True)
        for n in SEQLENS
    ]


def from_grid(folder):
    """What bench_attention recorded of these shapes, with its commit and versions, or None if it lacks one.

    An implementation that was refused or took too long has been measured: it has no time, and a reason.
    """
    results = record.load_results("attention", folder)
    if results is None:
        return None
    keys = tuple(ladder_cases()[0].record())
    rows = {
        (*(row[key] for key in keys), row["impl"]): row
        for row in results["rows"] + results["not_timed"]
        if row["pass"] == "forward"
    }
    wanted = [(*case.record().values(), name) for case in ladder_cases() for name in NAMES]
    if any(key not in rows for key in wanted):
        return None
    timed = [rows[key] for key in wanted if "ms" in rows[key]]
    origin = {key: value for key, value in results.items() if key not in ("rows", "not_timed", "ratios", "ended_early")}
    return origin | {"command": "make bench", "rows": timed}


def measure(device):
    rows = []
    for seed, case in enumerate(ladder_cases()):
        plan = Plan(rounds=9, slot_ms=8.0, limit_ms=400.0, max_seconds=10.0, seed=seed)
        rows += compare(case, NAMES, ("forward",), device, plan)
    return {"command": "python -m benchmarks.ladder", "rows": record.split_rows(rows)[0]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    record.add_output_option(parser)
    options = parser.parse_args()
    device, screen = record.default_device(), tables.console()
    payload = from_grid(options.output_dir or record.results_dir(device))
    if payload is None and device.type != "cuda":
        screen.print("No GPU here, and no recorded grid that holds these shapes: nothing to show.")
        return 1
    baselines.use_full_fp32()
    payload = payload or measure(device)
    for causal in (False, True):
        title = f"forward, head_dim {HEAD_DIM}{', causal' if causal else ''}: TFLOP/s"
        chosen = [row for row in payload["rows"] if row["causal"] == causal]
        screen.print(tables.grid_table(title, chosen, NAMES), "")
    path = record.write_results("ladder", device, payload, options.output_dir)
    where = payload.get("gpu") or record.device_name(device)
    subtitle = f"{where}, bf16, forward, head_dim {HEAD_DIM}, {TOKENS:,} tokens, hidden size {HIDDEN}"
    picture = plot_ladder(payload["rows"], path.with_suffix(".png"), "What each generation bought", subtitle)
    screen.print(f"results: {path}\nplot:    {picture}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
