"""The main job: naive attention, torch's SDPA, v1, v2 and v3 side by side on the best device present.

Prints a table per shape (time, speed-up over naive, TFLOP/s, extra memory), draws demo.png and writes
demo.json. Without a GPU it runs the CPU kernels on smaller shapes.
"""

import argparse
import sys
import time

from benchmarks import baselines, record, tables
from benchmarks.baselines import BASELINES, DEMO_BASELINES
from benchmarks.cases import PASSES, AttentionCase
from benchmarks.comparison import compare
from benchmarks.plots import plot_speedups
from benchmarks.timing import Plan

SMALL_SHAPES = ((1, 256), (2, 512), (4, 1024))  # (batch, seqlen), one head of 64


def demo_cases(device):
    dtypes = ("fp32", "fp16") if device.type == "cuda" else ("fp32",)
    cases = [AttentionCase(b, 1, n, 64, dtype) for dtype in dtypes for b, n in SMALL_SHAPES]
    if device.type == "cuda":
        return [
            *cases,
            AttentionCase(4, 16, 1024, 64, "fp16"),
            AttentionCase(2, 16, 2048, 64, "fp32"),
            AttentionCase(2, 16, 2048, 128, "bf16", causal=True),
            AttentionCase(1, 32, 4096, 128, "bf16", causal=True, heads_kv=8),
            AttentionCase(1, 16, 8192, 128, "bf16", causal=True),
        ]
    return [
        *cases,
        AttentionCase(1, 1, 256, 64, "fp16"),
        AttentionCase(1, 8, 1024, 64, "fp32"),
        AttentionCase(1, 8, 1024, 64, "fp32", causal=True),
        AttentionCase(1, 8, 512, 128, "bf16", causal=True, heads_kv=2),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget-seconds", type=float, default=90, help="time for all shapes together")
    record.add_output_option(parser)
    options = parser.parse_args()

    device = record.default_device()
    screen = tables.console()
    record.metadata(device)
    introduce(screen, device)
    baselines.use_full_fp32()

    cases, results, failure = demo_cases(device), [], None
    names = [name for name in DEMO_BASELINES if device.type in BASELINES[name].devices]
    deadline = time.monotonic() + options.budget_seconds
    with tables.progress_bar(screen) as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=case.label())
            share = max(1.0, (deadline - time.monotonic()) / (len(cases) - len(results)))
            plan = Plan(rounds=11, slot_ms=5.0, limit_ms=2000.0, max_seconds=share / 2)
            try:
                rows = compare(case, names, PASSES, device, plan, with_memory=True)
            except RuntimeError as error:  # the device is lost, or cannot hold the inputs
                failure = error
                break
            results.append((case.label(), rows))
            progress.advance(task)

    report(screen, results)
    folder = options.output_dir or record.results_dir(device)
    if results:
        save(screen, device, folder, results)
    if failure:
        screen.print(f"Ended early: {failure}", style="bold red", markup=False)
        return 1
    return 0


def introduce(screen, device):
    name = record.device_name(device)
    if device.type == "cuda":
        screen.print(f"[bold]flash_ext on {name}[/]")
    else:
        screen.print(f"[bold yellow]No GPU here: running the CPU kernels[/] on {name}.")
    screen.print(
        "Shapes are batch x heads x seqlen x head_dim. Speed-up is over naive attention.\n"
        "Memory is what a call needs beyond its inputs and results"
        + (".\n" if device.type == "cuda" else "; only GPUs keep count of it.\n")
    )


def report(screen, results):
    every_row = [row for _, rows in results for row in rows]
    for label, rows in results:
        screen.print(tables.case_table(label, rows), "")
    for line in tables.notes(every_row):
        screen.print(f"  {line}", style="dim", markup=False)


def save(screen, device, folder, results):
    every_row = [row for _, rows in results for row in rows]
    timed, failed = record.split_rows(every_row)
    path = record.write_results("demo", device, {"rows": timed, "not_timed": failed}, folder)
    picture = plot_speedups(
        results,
        path.with_suffix(".png"),
        "Attention side by side: speed-up over naive",
        f"{record.device_name(device)}; batch x heads x seqlen x head_dim; further right is faster",
    )
    screen.print(f"\nresults: {path}\nplot:    {picture}", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
