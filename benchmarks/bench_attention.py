"""The papers' grid: 16,384 tokens, hidden size 2048, head_dim 64 to 256, seqlen 512 to 16k, causal or not.

Tensors are stored (batch, seqlen, heads, head_dim) and viewed as (batch, heads, seqlen, head_dim), as a
model's projections leave them. Prints tables and the geometric means of the ratios, writes
attention.json (attention_fp16.json for --dtype fp16), a plot of the same name, and one of what each
generation bought.
"""

import argparse
import sys
import time

from benchmarks import baselines, record, tables
from benchmarks.baselines import GRID_BASELINES
from benchmarks.cases import PASSES, AttentionCase
from benchmarks.comparison import compare
from benchmarks.plots import plot_grid, plot_ladder
from benchmarks.timing import Plan

TOKENS, HIDDEN = 16384, 2048
HEAD_DIMS = (64, 128, 256)
SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)
OURS = ("flash_ext_v1", "flash_ext_v2", "flash_ext_v3")
QUICK = {"head_dim": (64, 128), "seqlen": (512, 2048, 8192)}


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pass", dest="passes", choices=PASSES, nargs="+", default=list(PASSES))
    parser.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16")
    parser.add_argument("--head-dim", type=int, nargs="+")
    parser.add_argument("--seqlen", type=int, nargs="+")
    parser.add_argument("--causal", choices=("no", "yes", "both"), default="both")
    parser.add_argument("--impl", choices=GRID_BASELINES, nargs="+", default=list(GRID_BASELINES))
    parser.add_argument("--tokens", type=int, default=TOKENS, help="batch * seqlen")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and rounds")
    parser.add_argument("--budget-seconds", type=float, default=330, help="time for the whole grid")
    record.add_output_option(parser)
    options = parser.parse_args()
    options.head_dim = options.head_dim or (QUICK["head_dim"] if options.quick else HEAD_DIMS)
    options.seqlen = options.seqlen or (QUICK["seqlen"] if options.quick else SEQLENS)
    return options


def grid_cases(options):
    masks = {"no": (False,), "yes": (True,), "both": (False, True)}[options.causal]
    return [
        AttentionCase(
            batch=max(1, options.tokens // seqlen),
            heads=max(1, HIDDEN // head_dim),
            seqlen=seqlen,
            head_dim=head_dim,
            dtype=options.dtype,
            causal=causal,
            layout="bshd",
        )
        for head_dim in options.head_dim
        for causal in masks
        for seqlen in options.seqlen
    ]


def measure(cases, options, device, screen):
    """(rows, what ended the run early or None)."""
    rows, ended = [], None
    deadline = time.monotonic() + options.budget_seconds
    with tables.progress_bar(screen) as progress:
        task = progress.add_task("", total=len(cases))
        for done, case in enumerate(cases):
            progress.update(task, description=case.label())
            left = deadline - time.monotonic()
            if left <= 0:
                ended = f"{options.budget_seconds:.0f} s were spent after {done} of {len(cases)} shapes"
                break
            # What a case does not use, the later ones may.
            plan = Plan(
                rounds=5 if options.quick else 9,
                slot_ms=8.0,
                limit_ms=400.0,
                max_seconds=0.8 * left / (len(cases) - done),
                seed=done,
            )
            try:
                rows += compare(case, options.impl, options.passes, device, plan)
            except RuntimeError as error:  # the device is lost, or cannot hold the inputs
                ended = f"{case.label()}: {error}"
                break
            progress.advance(task)
    return rows, ended


def ratios(rows):
    """Geometric means of time ratios: {"forward": {"flash_ext_v2/sdpa_flash": 1.2, ...}, ...}."""
    times = {}
    for row in rows:
        if row["ms"] is not None and row["check"] == "passed":
            shape = tuple(row[key] for key in ("pass", "dtype", "head_dim", "causal", "seqlen", "batch"))
            times.setdefault(shape, {})[row["impl"]] = row["ms"]
    means = {}
    for pass_name in PASSES:
        for ours in OURS:
            for other in GRID_BASELINES:
                values = [
                    at[other] / at[ours]
                    for shape, at in times.items()
                    if shape[0] == pass_name and ours in at and other in at
                ]
                if values and other not in OURS:
                    means.setdefault(pass_name, {})[f"{ours}/{other}"] = {
                        "ratio": tables.geometric_mean(values),
                        "worst": min(values),
                        "shapes": len(values),
                    }
    return means


def report(screen, rows, means):
    names = [name for name in GRID_BASELINES if any(row["impl"] == name for row in rows)]
    groups = {}
    for row in rows:
        groups.setdefault((row["pass"], row["head_dim"], row["causal"]), []).append(row)
    for key in sorted(groups, key=lambda key: (key[0] != "forward", key)):
        pass_name, head_dim, causal = key
        title = f"{pass_name}, head_dim {head_dim}{', causal' if causal else ''}: TFLOP/s"
        screen.print(tables.grid_table(title, groups[key], names), "")
    for line in tables.notes(rows):
        screen.print(f"  {line}", style="dim", markup=False)
    screen.print("\n[bold]Speed over the others, geometric mean (worst shape)[/]")
    for pass_name, pairs in means.items():
        for pair, mean in pairs.items():
            ours, other = (tables.LABELS[name] for name in pair.split("/"))
            screen.print(
                f"  {pass_name:<9} {ours} over {other:<15}{mean['ratio']:6.2f}  ({mean['worst']:.2f},"
                f" {mean['shapes']} shapes)",
                highlight=False,
            )


def plot(rows, path, where, tokens, screen):
    size = f"{tokens:,} tokens, hidden size {HIDDEN}"
    pictures = [plot_grid(rows, path.with_suffix(".png"), f"Attention on {where}", f"{size}; higher is better")]
    if ladder := tables.ladder_rows(rows):
        subtitle = f"{where}, forward, head_dim {tables.LADDER_HEAD_DIM}, {size}"
        ladder_path = path.with_name(f"{path.stem}_ladder.png")
        pictures.append(plot_ladder(ladder, ladder_path, "What each generation bought", subtitle))
    for picture in pictures:
        screen.print(f"plot:    {picture}", highlight=False)


def main():
    options = parse_options()
    device, screen = record.default_device(), tables.console()
    record.metadata(device)
    screen.print(f"[bold]Attention on {record.device_name(device)}[/], {options.dtype}")
    baselines.use_full_fp32()

    rows, ended = measure(grid_cases(options), options, device, screen)
    means = ratios(rows)
    report(screen, rows, means)
    timed, failed = record.split_rows(rows)
    name = "attention" if options.dtype == "bf16" else f"attention_{options.dtype}"
    payload = {"ended_early": ended, "ratios": means, "rows": timed, "not_timed": failed}
    path = record.write_results(name, device, payload, options.output_dir)
    screen.print(f"\nresults: {path}", highlight=False)
    if timed:
        plot(timed, path, f"{record.device_name(device)}, {options.dtype}", options.tokens, screen)
    if ended:
        screen.print(f"Ended early: {ended}", style="bold red", markup=False)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
