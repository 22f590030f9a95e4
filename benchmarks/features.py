"""General attention on a GPU: what its arguments cost, beside plain v3, SDPA and compiled FlexAttention.

bf16, head_dim 64 and 128, forward and backward. Contenders are checked against v2's kernels on the very inputs
before they are timed (dropout of others cannot be), and weighed: bytes at the peak beyond inputs and results.
"""

import argparse
import dataclasses
import functools
import sys

import torch

from benchmarks import record, tables
from benchmarks.baselines import TOLERANCE, relative_error
from benchmarks.comparison import MODES, extra_memory
from benchmarks.feature_contests import CONTESTS, WITH_FLEX
from benchmarks.timing import Contender, Plan, Timing, attempt, time_contenders


def call(run, leaves, dout, mode):
    """(output, gradients...) of one call; `mode` is forward, forward_with_grad or forward_backward."""
    if mode == "forward":
        with torch.no_grad():
            return (run(*leaves),)
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = run(*leaves)
    if mode == "forward_with_grad":
        return (out,)
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


def check(entry, dout, expected):
    """Error text, or None where all results are as v2's kernels have them."""
    got = call(entry.run, entry.leaves, dout, "forward_backward")
    worst = max(relative_error(x, y) for x, y in zip(got, expected, strict=True))
    return None if worst <= TOLERANCE["bf16"][1] else f"results off by {worst:.1e} (relative)"


def measure(contest, device, plan):
    """One row for each pass and contender."""
    rows, contenders, expected = {}, {}, {}
    for name, entry in contest.entries.items():
        generator = torch.Generator(device=device).manual_seed(1)
        dout = torch.randn(entry.leaves[0].shape, device=device, dtype=entry.leaves[0].dtype, generator=generator)
        wrong, error = None, None
        if entry.reference is not None:
            if entry.reference not in expected:
                expected = {entry.reference: call(entry.reference, entry.leaves, dout, "forward_backward")}
            wrong, error = attempt(functools.partial(check, entry, dout, expected[entry.reference]), device)
        for pass_name in contest.passes:
            modes = MODES[pass_name]
            measured = functools.partial(call, entry.run, entry.leaves, dout, modes[0])
            extra = None
            if error is None:
                extra, error = attempt(functools.partial(extra_memory, measured, device), device)
            rows[pass_name, name] = {
                "contest": contest.name,
                "shape": contest.shape,
                "head_dim": contest.head_dim,
                "pass": pass_name,
                "impl": name,
                "ms": None,
                "tflops": None,
                "check": wrong or ("passed" if entry.reference is not None else "none"),
                "extra_bytes": extra,
                "error": error,
            }
            if error is None:
                for mode in modes:
                    run = functools.partial(call, entry.run, entry.leaves, dout, mode)
                    contenders[name, mode] = Contender(run)
    timings = time_contenders(contenders, device, plan)
    for (pass_name, name), row in rows.items():
        if row["error"] is None:
            _fill(row, contest, contest.entries[name], [timings[name, mode] for mode in MODES[pass_name]])
    return list(rows.values())


def _fill(row, contest, entry, timings):
    failures = [timing for timing in timings if not isinstance(timing, Timing)]
    if failures:
        row["error"] = failures[0]
        return
    row["ms"] = timings[0].ms - sum(timing.ms for timing in timings[1:])
    flops = 4 * entry.visible * contest.heads * contest.head_dim * (2.5 if row["pass"] == "backward" else 1)
    row["tflops"] = flops / row["ms"] / 1e9
    row["spread"] = max(timing.spread for timing in timings)


def verdicts(contest, rows):
    """One line for each promise and pass: the ratio, and what it should be."""
    at = {(row["pass"], row["impl"]): row for row in rows if row["ms"] is not None}
    for promise in contest.promises:
        for pass_name, at_least in promise.at_least.items():
            line = {
                "contest": contest.name,
                "head_dim": contest.head_dim,
                "pass": pass_name,
                "ours": promise.ours,
                "at_least": at_least,
            }
            others = [at[pass_name, name] for name in promise.over if (pass_name, name) in at]
            ours = at.get((pass_name, promise.ours))
            if ours is None or not others:
                yield line | {"over": promise.over[0], "ratio": None}
                continue
            fastest = min(others, key=lambda row: row["ms"])
            ratio = ours["tflops"] / fastest["tflops"] if promise.per_flop else fastest["ms"] / ours["ms"]
            yield line | {"over": fastest["impl"], "ratio": ratio}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--no-flex", action="store_true", help="without FlexAttention, whose compilation takes minutes")
    parser.add_argument("--only", nargs="*", choices=[make.__name__ for make in CONTESTS], help="these contests alone")
    parser.add_argument("--head-dims", nargs="*", type=int, default=[64, 128])
    record.add_output_option(parser)
    options = parser.parse_args()
    device, screen = record.default_device(), tables.console()
    if device.type != "cuda":
        raise SystemExit("benchmarks.features times CUDA kernels; this machine has no GPU that torch can use")
    plan = Plan(rounds=options.rounds, slot_ms=6.0, max_seconds=20)
    chosen = [make for make in CONTESTS if not options.only or make.__name__ in options.only]
    runs = [(make, head_dim, False) for make in chosen for head_dim in options.head_dims]
    if not options.no_flex:  # last: what has been measured by then is kept if a compilation goes wrong
        runs += [(make, head_dim, True) for make in chosen if make in WITH_FLEX for head_dim in options.head_dims]
    all_rows, all_promises = [], []
    for make, head_dim, with_flex in runs:
        torch.manual_seed(0)
        contest = make(head_dim, with_flex)
        if with_flex:
            contest = dataclasses.replace(contest, name=f"{contest.name} beside FlexAttention")
        screen.print(f"\n[bold]{contest.name}[/], {contest.shape}, head_dim {head_dim}", highlight=False)
        rows = measure(contest, device, plan)
        for row in rows:
            time = tables.format_ms(row["ms"]) if row["ms"] is not None else row["error"]
            screen.print(f"  {row['pass']:<9}{row['impl']:<32}{time:>12}  {row['check']}", highlight=False)
        promises = list(verdicts(contest, rows))
        for line in promises:
            ratio = "not run" if line["ratio"] is None else f"{line['ratio']:.2f}"
            text = f"  {line['pass']:<9}{line['ours']} over {line['over']}: {ratio} for {line['at_least']}"
            screen.print(text, highlight=False)
        all_rows += rows
        all_promises += promises
        timed, failed = record.split_rows(all_rows)
        payload = {"promises": all_promises, "rows": timed}
        path = record.write_results("features", device, payload | {"not_timed": failed}, options.output_dir)
        del contest
        torch.cuda.empty_cache()
    screen.print(f"\nresults: {path}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
