"""Extra device memory of a call, beyond its inputs and results: naive, v1, v2 and v3 by sequence length.

Two questions: how much is saved on the short sequences where naive attention still fits (one head,
head_dim 64), and does the need grow linearly to 128k tokens. The count is the CUDA caching allocator's
(peak minus what was there before and what is returned), so it is exact and needs one call.
"""

import argparse
import sys
from functools import partial

from benchmarks import record, tables
from benchmarks.baselines import BASELINES
from benchmarks.cases import PASSES, AttentionCase
from benchmarks.comparison import call, extra_memory
from benchmarks.plots import plot_memory
from benchmarks.timing import attempt

NAMES = ("naive", "flash_ext_v1", "flash_ext_v2", "flash_ext_v3")
SHORT = ((2, 512), (4, 1024))  # (batch, seqlen)
LONG = tuple(1024 << i for i in range(8))  # 1k .. 128k
# v1 gives a head to one thread block: longer sequences of one head take it seconds.
V1_LONGEST = 16384


def measure(case, device):
    """One row per (pass, implementation); "backward" is a forward and a backward together."""
    rows, inputs = [], case.make_inputs(device)

    def weigh(name, mode):
        return extra_memory(lambda: call(name, case, inputs, mode), device)

    for pass_name in PASSES:
        mode = "forward" if pass_name == "forward" else "forward_backward"
        for name in NAMES:
            if name == "flash_ext_v1" and case.seqlen > V1_LONGEST:
                continue
            row = {"pass": pass_name, **case.record(), "impl": name, "extra_bytes": None}
            row["error"] = BASELINES[name].refusal(case, pass_name, device)
            if row["error"] is None:
                row["extra_bytes"], row["error"] = attempt(partial(weigh, name, mode), device)
            rows.append(row)
    return rows


def savings(rows):
    """Part of naive attention's extra memory that each implementation does without."""
    naive = {_shape(row): row["extra_bytes"] for row in rows if row["impl"] == "naive"}
    return [
        {key: row[key] for key in ("pass", "dtype", "seqlen", "batch", "impl")}
        | {"saved": 1 - row["extra_bytes"] / naive[_shape(row)]}
        for row in rows
        if row["impl"] != "naive" and row["extra_bytes"] is not None and naive.get(_shape(row))
    ]


def growth(rows):
    """Factor of memory over factor of length, first to last measured: 1.0 is exactly linear."""
    result = {}
    for pass_name in PASSES:
        for name in NAMES:
            points = sorted(
                (row["seqlen"], row["extra_bytes"])
                for row in rows
                if row["pass"] == pass_name and row["impl"] == name and row["extra_bytes"]
            )
            if len(points) > 1:
                (first, low), (last, high) = points[0], points[-1]
                result[f"{pass_name} {name}"] = {
                    "from": first,
                    "to": last,
                    "memory_over_length": (high / low) / (last / first),
                }
    return result


def _shape(row):
    return tuple(row[key] for key in ("pass", "dtype", "batch", "heads", "seqlen"))


def report(screen, rows, saved, grown):
    for row in rows:
        name = f"{row['batch']}x{row['heads']}x{row['seqlen']}x{row['head_dim']} {row['dtype']}"
        text = row["error"] or tables.format_bytes(row["extra_bytes"])
        line = f"{row['pass']:<9}{name:<20}{tables.LABELS[row['impl']]:<14}{text:>12}"
        screen.print(line, highlight=False, markup=False)
    for row in saved:
        screen.print(
            f"{tables.LABELS[row['impl']]} saves {row['saved']:.2%} of naive's extra memory: {row['pass']},"
            f" {row['dtype']}, {row['batch']} x {row['seqlen']}",
            highlight=False,
        )
    for what, line in grown.items():
        screen.print(
            f"{what}: {line['memory_over_length']:.3f} times linear from {line['from']} to {line['to']}",
            highlight=False,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    record.add_output_option(parser)
    options = parser.parse_args()
    device, screen = record.default_device(), tables.console()
    if device.type != "cuda":
        screen.print("Only GPUs keep count of allocations: nothing to measure here.")
        return 1
    short = [
        row
        for dtype in ("fp16", "fp32")
        for batch, seqlen in SHORT
        for row in measure(AttentionCase(batch, 1, seqlen, 64, dtype), device)
    ]
    long = [row for seqlen in LONG for row in measure(AttentionCase(1, 1, seqlen, 64, "fp16"), device)]
    saved, grown = savings(short), growth(long)
    report(screen, short + long, saved, grown)
    payload = {"short": short, "savings": saved, "long": long, "growth": grown}
    path = record.write_results("memory", device, payload, options.output_dir)
    picture = plot_memory(
        long,
        path.with_suffix(".png"),
        "Extra memory of one call",
        f"{record.device_name(device)}; one head of 64, fp16; beyond inputs and results",
    )
    screen.print(f"\nresults: {path}\nplot:    {picture}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
