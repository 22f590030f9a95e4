"""The numbers the package promises beside what was recorded on a device; writes claims.json.

Measures nothing itself: each row names the command whose result file it reads.
"""

import argparse
import sys

from benchmarks import record, tables
from benchmarks.tables import geometric_mean

VERDICTS = {True: "[green]met    [/]", False: "[red]missed [/]", None: "[dim]not run[/]"}


def claims(folder):
    """Rows {"row", "target", "measured", "met", "command"}; measured is None where nothing was recorded."""
    rows = []
    for make, name in (
        (_grid_claims, "attention"),
        (_small_shape_claims, "small_shapes"),
        (_memory_claims, "memory"),
        (_host_claims, "host_time"),
        (_traffic_claims, "hbm_traffic"),
    ):
        rows += make(record.load_results(name, folder) or {})
    return rows


def _claim(row, target, measured, met, command, digits="{:.2f}"):
    text = None if measured is None else measured if isinstance(measured, str) else digits.format(measured)
    return {
        "row": row,
        "target": target,
        "measured": text,
        "met": None if measured is None else bool(met(measured)),
        "command": f"python -m benchmarks.{command}",
    }


def at_least(bound):
    return lambda value: value >= bound


def _grid_claims(results):
    ratios = results.get("ratios", {})
    for pass_name in ("forward", "backward"):
        mean = ratios.get(pass_name, {}).get("flash_ext_v2/sdpa_flash", {}).get("ratio")
        row = f"v2 {pass_name} over SDPA flash (FA2), geometric mean over the papers' grid, bf16"
        yield _claim(row, "0.60", mean, at_least(0.6), "bench_attention")


def _small_shape_claims(results):
    ratios = results.get("ratios", [])

    def select(**wanted):
        return [line["ratio"] for line in ratios if all(line[key] == value for key, value in wanted.items())]

    for dtype, bound in (("fp16", 2.0), ("fp32", 1.9)):
        found = select(group="one_head", impl="flash_ext_v2", dtype=dtype)
        row = f"v2 over naive, forward, {dtype}, 4 x 1 head x 1024 x 64, GPU time"
        yield _claim(row, f"{bound}x", min(found, default=None), at_least(bound), "small_shapes", "{:.2f}x")
    worst = min(select(group="full_gpu", impl="flash_ext_v1"), default=None)
    row = "v1 over naive, forward, d=64, batch*heads >= 132, seqlen >= 1024 (worst shape)"
    yield _claim(row, "> 1.0x", worst, lambda value: value > 1.0, "small_shapes", "{:.2f}x")
    worst = min(select(group="fp32", impl="flash_ext_v2"), default=None)
    row = "v2 over naive, forward and backward, fp32, seqlen >= 512 (worst shape)"
    yield _claim(row, "1.0x", worst, at_least(1.0), "small_shapes", "{:.2f}x")


def _memory_claims(results):
    for seqlen, bound in ((512, 0.94), (1024, 0.97)):
        found = [
            line["saved"]
            for line in results.get("savings", [])
            if line["seqlen"] == seqlen and line["impl"] == "flash_ext_v2" and line["pass"] == "forward"
        ]
        row = f"extra memory saved against naive, forward, seqlen {seqlen} (one head, d=64; worst dtype)"
        yield _claim(row, f"{bound:.0%}", min(found, default=None), at_least(bound), "memory", "{:.1%}")
    grown = {key: line for key, line in results.get("growth", {}).items() if key.endswith("flash_ext_v2")}
    factor = max((line["memory_over_length"] for line in grown.values()), default=None)
    reached = max((line["to"] for line in grown.values()), default=0)
    row = f"growth of v2's extra memory over growth of length, to {reached // 1024}k (1 is linear)"
    yield _claim(row, "1.0 at 128k", factor, lambda value: value <= 1.05 and reached >= 131072, "memory")


def _host_claims(results):
    times = {}
    for line in results.get("rows", []):
        columns = ("dtype", "head_dim", "causal", "seqlen", "batch", "heads", "grad")
        shape = tuple(line[column] for column in columns)
        times.setdefault(shape, {})[line["impl"]] = line["us"]
    for grad in (False, True):
        ratios = [at["flash_ext_v2"] / at["sdpa"] for shape, at in times.items() if shape[-1] == grad]
        mode = "recording gradients" if grad else "no gradients"
        row = f"host time of one forward call over SDPA's, {mode} (geometric mean)"
        yield _claim(row, "<= 1.0", geometric_mean(ratios), lambda value: value <= 1.0, "host_time")


def _traffic_claims(results):
    rows = [row for row in results.get("rows", []) if row["read_bytes"] is not None]
    complete = f"{len(rows)} of {len(results['rows'])} measured" if rows else None
    row = "HBM traffic of naive, v1, v2 by profiler counters beside the IO model, d=64, 1k to 8k"
    yield _claim(row, "table and plot", complete, lambda _: len(rows) == len(results["rows"]), "hbm_traffic")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    record.add_output_option(parser)
    options = parser.parse_args()
    device, screen = record.default_device(), tables.console()
    rows = claims(options.output_dir or record.results_dir(device))
    for row in rows:
        found = f"{row['measured'] or '-'} (target {row['target']})"
        screen.print(f"{VERDICTS[row['met']]} {found:<24} {row['row']}", highlight=False)
    path = record.write_results("claims", device, {"rows": rows}, options.output_dir)
    screen.print(f"\nresults: {path}", highlight=False)
    return 1 if any(row["met"] is False for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
