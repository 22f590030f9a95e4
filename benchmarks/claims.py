"""The numbers the package promises beside what was recorded on a device; writes claims.json.

Measures nothing itself: each row names the command whose result file it reads.
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks import record, tables
from benchmarks.cases import PASSES
from benchmarks.tables import geometric_mean

PEERS = json.loads((Path(__file__).parent / "peers_h200.json").read_text())
BEST_PEER = "the best of FlashAttention-3 and -4 and SDPA (peers_h200.json)"
VERDICTS = {True: "[green]met    [/]", False: "[red]missed [/]", None: "[dim]not run[/]"}


def claims(folder):
    """Rows {"row", "target", "measured", "met", "command"}; measured is None where nothing was recorded."""
    rows = []
    for make, name in (
        (_grid_claims, "attention"),
        (_v3_claims, "attention"),
        (_small_shape_claims, "small_shapes"),
        (_few_tiles_claims, "small_shapes"),
        (_v2_claims, "small_shapes"),
        (_hopper_claims, "small_shapes"),
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


# What v2 is to reach over torch's FlashAttention-2: the geometric mean, and the worst shape.
V2_TARGETS = {"forward": (1.05, 0.97), "backward": (1.03, 0.95)}


def _grid_claims(results):
    for pass_name, (mean, worst) in V2_TARGETS.items():
        found = _complete(speed_over(results, pass_name, "flash_ext_v2", "sdpa_flash"), pass_name).values()
        row = f"v2 {pass_name} over SDPA flash (FA2), geometric mean over the papers' grid, bf16"
        yield _claim(row, f"{mean:.2f}", geometric_mean(found), at_least(mean), "bench_attention")
        row = f"v2 {pass_name} over SDPA flash (FA2), worst shape, bf16"
        yield _claim(row, f"{worst:.2f}", min(found, default=None), at_least(worst), "bench_attention")


def speed_over(results, pass_name, impl, other):
    """(head_dim, causal, seqlen) -> speed of one implementation over that of another in the same run."""
    times = {}
    for row in results.get("rows", []):
        if row["pass"] == pass_name and row["check"] == "passed":
            times.setdefault(_cell(row), {})[row["impl"]] = row["ms"]
    return {cell: at[other] / at[impl] for cell, at in times.items() if {other, impl} <= at.keys()}


def _complete(found, pass_name):
    """All of the grid or nothing: a mean over some of the shapes would be another claim."""
    return found if {_cell(row) for row in PEERS[pass_name]} <= found.keys() else {}


def _cell(row):
    return row["head_dim"], row["causal"], row["seqlen"]


def _v3_claims(results):
    for pass_name in PASSES:
        yield from _v3_claims_of(pass_name, results)


# What v3 is to reach: over SDPA cuDNN, and over the best peer of each shape.
V3_TARGETS = {
    "forward": {"worst over cuDNN": 1.00, "mean": 1.05, "worst": 0.97, "ahead": 33},
    "backward": {"worst over cuDNN": 1.05, "mean": 1.05, "worst": 0.95, "ahead": 30},
}


def _v3_claims_of(pass_name, results):
    targets = V3_TARGETS[pass_name]
    peers = {_cell(row): row["best_over_cudnn"] for row in PEERS[pass_name]}
    found = _complete(speed_over(results, pass_name, "flash_ext_v3", "sdpa_cudnn"), pass_name)

    def claim(what, bound, value, digits="{:.2f}"):
        row, target = f"v3 {pass_name} {what}, bf16", digits.format(bound)
        return _claim(row, target, value, at_least(bound), "bench_attention", digits)

    over_peer = {}
    if results.get("gpu") == PEERS["gpu"]:  # what the peers reach holds on one kind of card
        over_peer = {cell: found[cell] / peers[cell] for cell in found.keys() & peers}
    every = over_peer.values()
    ahead = sum(ratio >= 1 for ratio in every) if every else None

    if pass_name == "forward":
        short = [ratio for cell, ratio in found.items() if cell[2] <= 1024]
        yield claim("over SDPA cuDNN, geometric mean at 512 and 1k", 1.15, geometric_mean(short))
    worst = min(found.values(), default=None)
    yield claim("over SDPA cuDNN, worst shape of the papers' grid", targets["worst over cuDNN"], worst)
    yield claim(f"over {BEST_PEER}, geometric mean over the papers' grid", targets["mean"], geometric_mean(every))
    if pass_name == "backward":
        short = [ratio for cell, ratio in over_peer.items() if cell[2] <= 1024]
        wide = [ratio for cell, ratio in over_peer.items() if cell[0] == 256]
        yield claim(f"over {BEST_PEER}, geometric mean at 512 and 1k", 1.10, geometric_mean(short))
        yield claim(f"over {BEST_PEER}, geometric mean at d=256", 1.05, geometric_mean(wide))
    yield claim(f"over {BEST_PEER}, worst shape", targets["worst"], min(every, default=None))
    yield claim(f"at or above {BEST_PEER}, shapes of {len(peers)}", targets["ahead"], ahead, "{:d}")


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
    yield _claim(row, "> 1.0x", worst, lambda value: value > 1.0, "small_shapes", "{:.3f}x")
    worst = min(select(group="fp32", impl="flash_ext_v2"), default=None)
    row = "v2 over naive, forward and backward, fp32, seqlen >= 512 (worst shape)"
    yield _claim(row, "1.0x", worst, at_least(1.0), "small_shapes", "{:.2f}x")


# Shapes of one sequence, and of four, whose tiles are fewer than a GPU's multiprocessors.
SHAPES_OF_FEW_TILES = {
    "1x1x256 and 2x1x512, d=64": ((1, 1, 256, 64), (2, 1, 512, 64)),
    "4x1x1024, d=64, and 1x1x4096, d=128": ((4, 1, 1024, 64), (1, 1, 4096, 128)),
}


def _few_tiles_claims(results):
    times = {}
    for row in results.get("rows", []):
        if (row["pass"], row["dtype"], row["causal"]) == ("forward", "bf16", False):
            shape = tuple(row[column] for column in ("batch", "heads", "seqlen", "head_dim"))
            times.setdefault(shape, {})[row["impl"]] = row["ms"]
    for name, shapes in SHAPES_OF_FEW_TILES.items():
        ratios = [
            min(ms for impl, ms in times[shape].items() if impl.startswith("sdpa")) / times[shape]["flash_ext_v2"]
            for shape in shapes
            if {"sdpa_flash", "sdpa_cudnn", "flash_ext_v2"} <= times.get(shape, {}).keys()
        ]
        worst = min(ratios) if len(ratios) == len(shapes) else None
        row = f"v2 forward over the best backend of SDPA, bf16, {name} (worst)"
        yield _claim(row, "1.00", worst, at_least(1.0), "small_shapes")


def _fp16_over_bf16(results, group, impl, pass_name):
    """Speed over the group's base in fp16 over the same in bf16, the worst head_dim; None if not recorded."""
    # Cases are timed one after the other, and the card's clock drifts: only ratios within one compare.
    over_base = {
        (line["head_dim"], line["dtype"]): line["ratio"]
        for line in results.get("ratios", [])
        if (line["group"], line["impl"], line["pass"]) == (group, impl, pass_name) and "heads_kv" not in line
    }
    fp16 = [ratio / over_base[d, "bf16"] for (d, dtype), ratio in over_base.items() if dtype == "fp16"]
    return min(fp16, default=None)


def _v2_claims(results):
    for pass_name in PASSES:
        row = f"v2 {pass_name} over SDPA flash, in fp16 over the same in bf16, causal, 4k, d=64, 128 and 256 (worst)"
        fp16 = _fp16_over_bf16(results, "flash", "flash_ext_v2", pass_name)
        yield _claim(row, "0.97", fp16, at_least(0.97), "small_shapes")
        for group, heads in ((4, "32/8"), (32, "32/1")):
            row = f"v2 {pass_name}, TFLOP/s with {heads} heads over those with 32, bf16, d=128, causal, 4k"
            rate = _rate_of_groups(results, "flash_ext_v2", pass_name, group)
            yield _claim(row, "1.00", rate, at_least(1.0), "small_shapes")
        found = [
            line["ratio"]
            for line in results.get("ratios", [])
            if (line["group"], line["pass"]) == ("fp32_long", pass_name)
        ]
        row = f"v2 {pass_name} over SDPA efficient, fp32, 16k tokens, d=64 and 128 (worst)"
        yield _claim(row, "1.00", min(found, default=None), at_least(1.0), "small_shapes")


def _hopper_claims(results):
    lines = [line for line in results.get("ratios", []) if line["impl"].startswith("flash_ext_v3")]
    for pass_name in PASSES:
        row = f"v3 {pass_name} over SDPA cuDNN, in fp16 over the same in bf16, causal, 4k, d=64, 128 and 256 (worst)"
        fp16 = _fp16_over_bf16(results, "hopper", "flash_ext_v3", pass_name)
        yield _claim(row, "0.97", fp16, at_least(0.97), "small_shapes")
        row = f"v3 {pass_name}, TFLOP/s with 32/8 heads over those with 32, bf16, d=128, causal, 4k"
        rate = _rate_of_groups(results, "flash_ext_v3", pass_name, 4)
        yield _claim(row, "1.00", rate, at_least(1.0), "small_shapes")
    for group, heads in ((1, "32"), (4, "32/8")):
        row = f"v3 forward and backward over {BEST_PEER}, {heads} heads, bf16, d=128, causal, 4k"
        yield _claim(row, "1.03", _step_over_peer(results, group), at_least(1.03), "small_shapes")
    times = [1 / line["ratio"] for line in lines if line["group"] == "deterministic"]
    row = "time of v3's deterministic backward over the default's, bf16, d=128, 8k (worst)"
    yield _claim(row, "<= 1.35", max(times, default=None), lambda value: value <= 1.35, "small_shapes")


def _model_layers(results, impl, pass_name):
    """Query heads per key head -> the row of one layer of a model: 32 heads of 128, bf16, causal, 4k."""
    wanted = {"impl": impl, "pass": pass_name, "dtype": "bf16", "heads": 32, "head_dim": 128, "seqlen": 4096}
    wanted["causal"] = True
    return {
        row["heads"] // row.get("heads_kv", row["heads"]): row
        for row in results.get("rows", [])
        if all(row[key] == value for key, value in wanted.items())
    }


def _rate_of_groups(results, impl, pass_name, group):
    """TFLOP/s with `group` query heads to a key head over those with one; None if not recorded."""
    layers = _model_layers(results, impl, pass_name)
    return layers[group]["tflops"] / layers[1]["tflops"] if {1, group} <= layers.keys() else None


def _step_over_peer(results, group):
    """Speed of v3's forward and backward together over those of the best peer of each, by cuDNN in the same run."""
    ours, peer = 0.0, 0.0
    for pass_name in PASSES:
        rows = [_model_layers(results, impl, pass_name).get(group) for impl in ("flash_ext_v3", "sdpa_cudnn")]
        if None in rows or results["gpu"] != PEERS["gpu"]:
            return None
        best_over_cudnn = {_cell(row): row["best_over_cudnn"] for row in PEERS[pass_name]}[128, True, 4096]
        ours, peer = ours + rows[0]["ms"], peer + rows[1]["ms"] / best_over_cudnn
    return peer / ours


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
    for algorithm in ("v2", "v3"):
        name = f"flash_ext_{algorithm}"
        for grad in (False, True):
            ratios = [at[name] / at["sdpa"] for shape, at in times.items() if shape[-1] == grad and name in at]
            mode = "recording gradients" if grad else "no gradients"
            row = f"host time of one forward call of {algorithm} over SDPA's, {mode} (geometric mean)"
            yield _claim(row, "<= 1.0", geometric_mean(ratios), lambda value: value <= 1.0, "host_time")


def _traffic_claims(results):
    rows = [row for row in results.get("rows", []) if row["read_bytes"] is not None]
    complete = f"{len(rows)} of {len(results['rows'])} measured" if rows else None
    row = "HBM traffic of naive, v1, v2, v3 by profiler counters beside the IO model, d=64, 1k to 8k"
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
